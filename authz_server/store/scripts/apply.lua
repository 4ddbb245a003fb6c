-- One change of a policy: compare, set, count, append the event. All of it or nothing: whatever could fail half way
-- is looked at before the first write, for Redis does not take back what a failing script has written.
--
-- KEYS  meta, counts, changes, result of this change id, then the hash of each collection
-- ARGV  format, epoch, change id, actor, reason, action, records (JSON, for the event), most events to keep, seconds
--       to keep the result, digest of the change, the revision that must be the newest ('': any), seconds to keep every
--       event, then the name of each collection (in the order of KEYS), then six for each record: number of its
--       collection (from 1), field, 'present' or 'absent', the text expected if present, 'set', 'delete' or 'check', the
--       text to set
-- Reply one of  {applied, revision}  {repeated, 'epoch revision digest'}  {absent}  {format, found}  {epoch, found}
--               {revision, found}  {conflict, number of the record (from 1), text found or nil}  {inconsistent, what}
--
-- A count is 'records revision sum': how many there are, which change was the last to touch the collection, and the sum
-- of 48 bits of SHA-1 of each field and text, so that texts edited by hand can be noticed.

local meta, counts, changes, result = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local format, epoch, change_id = ARGV[1], ARGV[2], ARGV[3]
local FIXED_KEYS, FIXED_ARGUMENTS, PER_RECORD = 4, 12, 6
local MODULUS = 281474976710656
local collections = #KEYS - FIXED_KEYS
local first = FIXED_ARGUMENTS + collections + 1

local function share(field, text)
  return tonumber(string.sub(redis.sha1hex(field .. '\0' .. text), 1, 12), 16)
end

local before = redis.call('GET', result)
if before then
  return {'repeated', before}
end

local found = redis.call('HMGET', meta, 'format', 'epoch', 'revision', 'last_change', 'records')
local previous_change = found[4]
if not found[1] then
  return {'absent'}
end
if found[1] ~= format then
  return {'format', found[1]}
end
if found[2] ~= epoch then
  return {'epoch', found[2] or ''}
end
if ARGV[11] ~= '' and ARGV[11] ~= found[3] then
  return {'revision', found[3] or ''}
end
local revision, records = tonumber(found[3]), tonumber(found[5])
if not revision or not records or not previous_change then
  return {'inconsistent', 'the fields of the meta key'}
end
local newest = redis.call('XREVRANGE', changes, '+', '-', 'COUNT', 1)
local last_id
if #newest > 0 then
  local info = redis.call('XINFO', 'STREAM', changes)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last_id = info[i + 1] end
  end
end
-- The last id given may be that of an entry that somebody deleted: then XADD would refuse ours, after the other writes.
if #newest == 0 or newest[1][1] ~= found[3] .. '-0' or last_id ~= newest[1][1] then
  return {'inconsistent', 'the change stream, which does not end with revision ' .. found[3]}
end

local after, sums, changed = {}, {}, {}
for i = 1, collections do
  local name = ARGV[FIXED_ARGUMENTS + i]
  local text = redis.call('HGET', counts, name) or '0 0 0'
  local count, sum = string.match(text, '^(%d+) %d+ (%d+)$')
  if not count then
    return {'inconsistent', 'the count of ' .. name .. ', which is ' .. text}
  end
  after[i], sums[i] = tonumber(count), tonumber(sum)
  local there = redis.call('HLEN', KEYS[FIXED_KEYS + i])
  if there ~= after[i] then
    return {'inconsistent', name .. ': ' .. there .. ' records instead of ' .. count}
  end
end
for i = first, #ARGV, PER_RECORD do
  local number, field, state, expected, act = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local text = redis.call('HGET', KEYS[FIXED_KEYS + number], field)
  if (state == 'present' and text ~= expected) or (state == 'absent' and text) then
    return {'conflict', (i - first) / PER_RECORD + 1, text}
  end
  if act ~= 'check' then
    changed[number] = true
    if text then
      after[number] = after[number] - 1
      records = records - 1
      sums[number] = sums[number] - share(field, text)
    end
    if act == 'set' then
      after[number] = after[number] + 1
      records = records + 1
      sums[number] = sums[number] + share(field, ARGV[i + 5])
    end
    sums[number] = sums[number] % MODULUS
  end
end

-- Commands in a script are checked against the caller's ACL one by one: one refused in the middle would leave half a
-- change behind.
local probe = {{'HSET', meta, 'format', format}, {'HSET', counts, 'a', '0'}, {'HDEL', counts, 'a'},
  {'SET', result, '', 'EX', '1'}, {'XADD', changes, '*', 'a', ''}}
for i = 1, collections do
  probe[#probe + 1] = {'HSET', KEYS[FIXED_KEYS + i], 'a', ''}
  probe[#probe + 1] = {'HDEL', KEYS[FIXED_KEYS + i], 'a'}
end
for _, command in ipairs(probe) do
  if not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user has no permission for ' .. command[1] .. ' on ' .. command[2])
  end
end

local now = redis.call('TIME')
local kept = first_kept(changes, revision + 1, ARGV[8], ARGV[12], now)
for i = first, #ARGV, PER_RECORD do
  local key, field, act = KEYS[FIXED_KEYS + tonumber(ARGV[i])], ARGV[i + 1], ARGV[i + 4]
  if act == 'set' then
    redis.call('HSET', key, field, ARGV[i + 5])
  elseif act == 'delete' then
    redis.call('HDEL', key, field)
  end
end
revision = string.format('%d', revision + 1)
local touched = {}
for i in pairs(changed) do
  local name = ARGV[FIXED_ARGUMENTS + i]
  touched[name] = after[i]
  if after[i] == 0 then
    redis.call('HDEL', counts, name)
  else
    redis.call('HSET', counts, name, string.format('%d %s %.0f', after[i], revision, sums[i]))
  end
end
redis.call('HSET', meta, 'revision', revision, 'last_change', change_id, 'records', records)
redis.call('XADD', changes, 'MINID', kept, revision .. '-0', 'epoch', epoch, 'change', change_id,
  'previous', previous_change, 'actor', ARGV[4], 'reason', ARGV[5], 'action', ARGV[6],
  'at', string.format('%d.%06d', now[1], now[2]), 'records', ARGV[7], 'counts', cjson.encode(touched))
redis.call('SET', result, epoch .. ' ' .. revision .. ' ' .. ARGV[10], 'EX', ARGV[9])
return {'applied', revision}
