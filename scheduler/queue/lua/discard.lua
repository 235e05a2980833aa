-- Gives up what a replay of an ended job would need. Returns 1 where there was something, else 0.
local id, keep_ms = ARGV[1], tonumber(ARGV[2])
redis.call('PEXPIRE', $job .. id .. ':none', 0)  -- always allowed, so that the script passes at maxmemory
local state = redis.call('HGET', $job .. id, 'state')
if not state or not ENDED[state] then return 0 end
local was_dead, had_body = forget_dead_letter(id), redis.call('DEL', $body .. id)
if redis.call('PTTL', $job .. id) > keep_ms then redis.call('PEXPIRE', $job .. id, keep_ms) end
return (was_dead or had_body == 1) and 1 or 0
