-- The end of an incident: what is there becomes the policy, under a new epoch. The counts were made anew beforehand,
-- under a key of their own; this only looks whether they still fit, and switches.
--
-- KEYS  meta, counts, changes, result of this change id, counts made anew, where to put a stream that cannot go on
-- ARGV  format, new epoch, change id, actor, reason, seconds to keep the result, action (and digest), records in all,
--       lines of the counts made anew, then the fields of meta as they were examined ('' for one that is missing):
--       format, epoch, revision, last_change, records
-- Reply one of  {applied, revision}  {repeated, 'epoch revision digest'}  {changed}

local meta, counts, changes, result, anew, aside = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local before = redis.call('GET', result)
if before then
  return {'repeated', before}
end
local found = redis.call('HMGET', meta, 'format', 'epoch', 'revision', 'last_change', 'records')
for i = 1, 5 do
  if (found[i] or '') ~= ARGV[9 + i] then
    return {'changed'}
  end
end
if redis.call('HLEN', anew) ~= tonumber(ARGV[9]) then
  return {'changed'}
end

local last_id = '0-0'
if redis.call('EXISTS', changes) == 1 then
  local info = redis.call('XINFO', 'STREAM', changes)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last_id = info[i + 1] end
  end
end
local revision = tonumber(found[3])
local top, sequence = string.match(last_id, '^(%d+)-(%d+)$')
-- Without the meta key the stream says where the policy stood.
if not revision or revision < 0 then
  revision = sequence == '0' and tonumber(top) or 0
end
local fits = last_id == string.format('%d-0', revision)

for _, command in ipairs({{'HSET', meta, 'a', ''}, {'DEL', meta}, {'UNLINK', counts}, {'RENAME', anew, counts},
  {'PERSIST', counts}, {'RENAME', changes, aside}, {'XADD', changes, '*', 'a', ''}, {'SET', result, '', 'EX', '1'}}) do
  if not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user has no permission for ' .. command[1] .. ' on ' .. command[2])
  end
end

if not fits and redis.call('EXISTS', changes) == 1 then
  redis.call('RENAME', changes, aside)
end
redis.call('UNLINK', counts)
if redis.call('EXISTS', anew) == 1 then
  redis.call('RENAME', anew, counts)
  redis.call('PERSIST', counts) -- what is staged is given up after an hour, and a renamed key keeps its end
end
revision = string.format('%d', revision + 1)
redis.call('DEL', meta)
redis.call('HSET', meta, 'format', ARGV[1], 'epoch', ARGV[2], 'revision', revision, 'last_change', ARGV[3],
  'records', ARGV[8])
local now = redis.call('TIME')
redis.call('XADD', changes, revision .. '-0', 'epoch', ARGV[2], 'change', ARGV[3],
  'previous', found[4] or '', 'actor', ARGV[4], 'reason', ARGV[5], 'action', ARGV[7],
  'at', string.format('%d.%06d', now[1], now[2]), 'records', '[]', 'counts', '{}')
redis.call('SET', result, ARGV[2] .. ' ' .. revision .. ' ' .. ARGV[7], 'EX', ARGV[6])
return {'applied', revision}
