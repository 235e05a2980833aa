-- Sets or removes what an operator holds up in a pool. ARGV: pool, a class, `*` (all classes) or `drain`; 1 or 0.
local pool, what, on = ARGV[1], ARGV[2], ARGV[3] == '1'
redis.call('DEL', $paused .. ':none')  -- always allowed, so that the script passes at maxmemory
if on then
  redis.call('HSET', $paused, pool .. '|' .. what, now_ms())
else
  redis.call('HDEL', $paused, pool .. '|' .. what)
  ring(pool, what)
end
