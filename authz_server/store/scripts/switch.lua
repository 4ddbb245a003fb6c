-- Puts collections that were written beforehand, under keys of their own, in the place of those that count. Small,
-- however many records they hold: keys are renamed, and the old ones are freed in the background.
--
-- KEYS  meta, counts, changes, result of this change id, differences, the difference of this change, then for each
--       collection: its hash, the one that was staged for it
-- ARGV  format, epoch, change id, actor, reason, action, most events to keep, seconds to keep the result, digest,
--       parts of the difference, records of the difference, seconds to keep every event, then four for each collection:
--       name, its line in counts as it was read ('' for none), records staged, sum of their shares
-- Reply one of  {applied, revision}  {repeated, 'epoch revision digest'}  {absent}  {format, found}  {epoch, found}
--               {touched, collection}  {inconsistent, what}

local meta, counts, changes, result, differences = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local format, epoch, change_id = ARGV[1], ARGV[2], ARGV[3]
local difference = KEYS[6]
local FIXED_KEYS, FIXED_ARGUMENTS, PER_COLLECTION = 6, 12, 4
local collections = (#KEYS - FIXED_KEYS) / 2

local before = redis.call('GET', result)
if before then
  return {'repeated', before}
end
local found = redis.call('HMGET', meta, 'format', 'epoch', 'revision', 'last_change', 'records')
if not found[1] then
  return {'absent'}
end
if found[1] ~= format then
  return {'format', found[1]}
end
if found[2] ~= epoch then
  return {'epoch', found[2] or ''}
end
local revision, records = tonumber(found[3]), tonumber(found[5])
if not revision or not records or not found[4] then
  return {'inconsistent', 'the fields of the meta key'}
end
local last_id
if redis.call('EXISTS', changes) == 1 then
  local info = redis.call('XINFO', 'STREAM', changes)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last_id = info[i + 1] end
  end
end
if last_id ~= found[3] .. '-0' then
  return {'inconsistent', 'the change stream, which does not end with revision ' .. found[3]}
end
for i = 1, collections do
  local argument = FIXED_ARGUMENTS + (i - 1) * PER_COLLECTION
  local name, line = ARGV[argument + 1], ARGV[argument + 2]
  if (redis.call('HGET', counts, name) or '') ~= line then
    return {'touched', name}
  end
  local counted = tonumber(string.match(line, '^(%d+) ') or '0')
  if redis.call('HLEN', KEYS[FIXED_KEYS + 2 * i - 1]) ~= counted then
    return {'inconsistent', name .. ', which does not hold ' .. counted .. ' records'}
  end
  local staged = redis.call('HLEN', KEYS[FIXED_KEYS + 2 * i])
  if staged ~= tonumber(ARGV[argument + 3]) then
    return {'inconsistent', 'what was staged for ' .. name .. ': ' .. staged .. ' records instead of '
      .. ARGV[argument + 3] .. '; it was given up after an hour'}
  end
  records = records - counted + staged
end
if redis.call('HLEN', difference) ~= tonumber(ARGV[10]) then
  return {'inconsistent', 'the difference that was staged; it was given up after an hour'}
end

local probe = {{'HSET', meta, 'format', format}, {'HSET', counts, 'a', '0'}, {'HDEL', counts, 'a'},
  {'HSET', differences, 'a', ''}, {'PERSIST', difference}, {'SET', result, '', 'EX', '1'}, {'XADD', changes, '*', 'a', ''}}
for i = 1, collections do
  local live, staged = KEYS[FIXED_KEYS + 2 * i - 1], KEYS[FIXED_KEYS + 2 * i]
  probe[#probe + 1] = {'UNLINK', live}
  probe[#probe + 1] = {'RENAME', staged, live}
  probe[#probe + 1] = {'PERSIST', live}
end
for _, command in ipairs(probe) do
  if not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user has no permission for ' .. command[1] .. ' on ' .. command[2])
  end
end

local now = redis.call('TIME')
local kept = first_kept(changes, revision + 1, ARGV[7], ARGV[12], now)
revision = string.format('%d', revision + 1)
local touched = {}
for i = 1, collections do
  local live, staged = KEYS[FIXED_KEYS + 2 * i - 1], KEYS[FIXED_KEYS + 2 * i]
  local argument = FIXED_ARGUMENTS + (i - 1) * PER_COLLECTION
  local name, number = ARGV[argument + 1], tonumber(ARGV[argument + 3])
  touched[name] = number
  redis.call('UNLINK', live)
  if number == 0 then
    redis.call('HDEL', counts, name)
  else
    redis.call('RENAME', staged, live)
    redis.call('PERSIST', live)
    redis.call('HSET', counts, name, number .. ' ' .. revision .. ' ' .. ARGV[argument + 4])
  end
end
redis.call('PERSIST', difference)
redis.call('HSET', differences, change_id, revision)
redis.call('HSET', meta, 'revision', revision, 'last_change', change_id, 'records', records)
redis.call('XADD', changes, 'MINID', kept, revision .. '-0', 'epoch', epoch, 'change', change_id,
  'previous', found[4], 'actor', ARGV[4], 'reason', ARGV[5], 'action', ARGV[6],
  'at', string.format('%d.%06d', now[1], now[2]), 'records', '[]', 'counts', cjson.encode(touched),
  'parts', ARGV[10], 'size', ARGV[11])
redis.call('SET', result, epoch .. ' ' .. revision .. ' ' .. ARGV[9], 'EX', ARGV[8])
return {'applied', revision}
