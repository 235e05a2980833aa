-- Logs and publishes one event per job, renews the lease, says what was fenced and cancelled: one round trip a step.
-- ARGV[3…]: one `<id> <attempt>-<seq> <payload>` per job. Returns 1, or {lease lost, fenced ids, cancelled ids}.
local worker, ttl = ARGV[1], ARGV[2]
local own, log, channel = $own .. worker, $log, $channel
redis.call('PEXPIRE', own, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local lost = not redis.call('ZSCORE', $lease, worker)
if not lost then redis.call('ZADD', $lease, text(now_ms() + ttl), worker) end

local fenced, ids = {}, {}
for i = 3, #ARGV do ids[i - 2] = string.match(ARGV[i], '^%S+') end
local attempts = #ids > 0 and redis.call('HMGET', own, unpack(ids))
for i, id in ipairs(ids) do
  local message = string.sub(ARGV[i + 2], #id + 2)
  local attempt, seq, from = string.match(message, '^(%d+)%-(%d+) ()')
  if attempts[i] ~= attempt then
    fenced[#fenced + 1] = id
  else
    local logged = redis.pcall('XADD', log .. id, 'NOMKSTREAM', attempt .. '-' .. seq, 'p', string.sub(message, from))
    if type(logged) == 'string' then
      redis.call('PUBLISH', channel .. id, message)
      if seq == '1' then redis.call('HSETNX', $job .. id, 'first', text(now_ms())) end
    elseif not logged then
      fenced[#fenced + 1] = id  -- the log is gone, and the job with it
    end  -- else: not above the last id, the repeat of an emit whose reply got lost
  end
end

local cancelled = redis.call('SMEMBERS', $cancels .. worker)
if lost or #fenced > 0 or #cancelled > 0 then return { lost and 1 or 0, fenced, cancelled } end
return 1
