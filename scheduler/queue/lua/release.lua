-- The recorder has these outcomes: ARGV[1] keep_ms, then `<id> <attempt>` each. Logs go after keep_ms, and so do the
-- hashes that no retry needs (it needs the body). Returns how many jobs were still at that end.
local keep_ms, released = tonumber(ARGV[1]), 0
redis.call('DEL', $job .. ':none')  -- always allowed, so that the script passes at maxmemory

local function shorten(key)
  if redis.call('PTTL', key) > keep_ms then redis.call('PEXPIRE', key, keep_ms) end
end

for i = 2, #ARGV do
  local id, attempt = string.match(ARGV[i], '^(%S+) (%d+)')
  local seen = redis.call('HMGET', $job .. id, 'finished', 'attempt', 'state')
  if seen[1] and seen[2] == attempt and ENDED[seen[3]] then
    shorten($log .. id)
    if redis.call('EXISTS', $body .. id) == 0 then shorten($job .. id) end
    released = released + 1
  end
end
return released
