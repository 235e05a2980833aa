-- Ends an attempt: seals the job, or schedules its retry, or buries it. Fenced by worker and attempt.
-- Returns 1 where this attempt's outcome stands (also on a repeated call), 0 where it was fenced.
local worker, id, attempt, outcome = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local payload, code, message = ARGV[5], ARGV[6], ARGV[7]
local prompt, completion, cached = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local delay, dead, keep_ms, ends = tonumber(ARGV[11]), ARGV[12] == '1', tonumber(ARGV[13]), ends_from(14)
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local now, mark = now_ms(), worker .. ' ' .. attempt

if redis.call('HGET', $own .. worker, id) ~= attempt then
  return redis.call('HGET', $job .. id, 'ended') == mark and 1 or 0
end
local job = load_job(id)
if not job then
  redis.call('HDEL', $own .. worker, id)
  return 0
end

local function retry()
  job.fails = job.fails + 1
  redis.call('HSET', $job .. id, 'fails', job.fails, 'code', code, 'message', message)
  if job.cancel or delay == 0 or (job.deadline > 0 and job.deadline <= now + delay) then
    return requeue(id, job, now, ends, keep_ms)
  end
  redis.call('HSET', $job .. id, 'state', 'scheduled')
  redis.call('HDEL', $job .. id, 'worker', 'sid')
  set_due(id, job, now + delay)
  count_depth(job, 1)
end

release(id, job)
redis.call('HSET', $job .. id, 'ended', mark)
if delay >= 0 then
  retry()
  return 1
end
redis.call('HSET', $job .. id, 'prompt', prompt, 'completion', completion, 'cached', cached)
credit(job, prompt + 2 * completion - job.cost)  -- the tenant was charged a guess at the claim
local final = { state = outcome, payload = payload, code = code, message = message }
if outcome == 'cancelled' then final = ends[job.cancel or 'cancelled'] end
if dead then
  bury(id, job, now, final, keep_ms)
else
  seal(id, job, now, final, keep_ms)
end
return 1
