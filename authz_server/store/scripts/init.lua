-- An empty policy: format, a new epoch, revision 1 and its event. Refused where anything of a policy is left.
--
-- KEYS  meta, counts, changes, result of this change id, then the hashes that every policy may have
-- ARGV  format, epoch, change id, actor, reason, seconds to keep the result, digest
-- Reply one of  {applied, '1'}  {repeated, 'epoch revision digest'}  {present}  {inconsistent, what}

local meta, changes, result = KEYS[1], KEYS[3], KEYS[4]
local format, epoch, change_id = ARGV[1], ARGV[2], ARGV[3]

-- The result of a change that came later is not ours: its id was taken for this one by mistake.
local before = redis.call('GET', result)
if before and string.find(before, ' ' .. ARGV[7] .. '$') then
  return {'repeated', before}
end
if redis.call('EXISTS', meta) == 1 then
  return {'present'}
end
for i, key in ipairs(KEYS) do
  if i ~= 4 and redis.call('EXISTS', key) == 1 then
    return {'inconsistent', key .. ', which is there without ' .. meta}
  end
end
for _, command in ipairs({{'XADD', changes, '*', 'a', ''}, {'HSET', meta, 'a', ''}, {'SET', result, '', 'EX', '1'}}) do
  if not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user has no permission for ' .. command[1] .. ' on ' .. command[2])
  end
end

local now = redis.call('TIME')
redis.call('XADD', changes, '1-0', 'epoch', epoch, 'change', change_id, 'previous', '', 'actor', ARGV[4],
  'reason', ARGV[5], 'action', 'init', 'at', string.format('%d.%06d', now[1], now[2]), 'records', '[]', 'counts', '{}')
redis.call('HSET', meta, 'format', format, 'epoch', epoch, 'revision', '1', 'last_change', change_id, 'records', '0')
redis.call('SET', result, epoch .. ' 1 ' .. ARGV[7], 'EX', ARGV[6])
return {'applied', '1'}
