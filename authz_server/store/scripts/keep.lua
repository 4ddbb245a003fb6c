-- Part of the scripts that append events.

-- The first revision to keep in the stream: of those before the newest `most`, the ones older than `seconds` go, two at
-- a time, so that no script takes long. The one that is being written counts as the newest.
local function first_kept(changes, newest, most, seconds, now)
  local last_to_go, moment = newest - tonumber(most), now[1] + now[2] / 1000000 - seconds
  local first = 0
  for _, event in ipairs(redis.call('XRANGE', changes, '-', '+', 'COUNT', 2)) do
    local revision, at = tonumber(string.match(event[1], '^%d+')), 0
    for i = 1, #event[2], 2 do
      if event[2][i] == 'at' then at = tonumber(event[2][i + 1]) or 0 end
    end
    if revision > last_to_go or at > moment then
      break
    end
    first = revision + 1
  end
  return string.format('%d-0', first)
end

