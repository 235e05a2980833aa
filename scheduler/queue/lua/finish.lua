-- Ends attempts: seals each job, or schedules its retry, or buries it. Fenced by worker and attempt.
-- ARGV: worker, keep_ms, then eleven words per job. Returns for each 1 where this attempt's outcome stands (also on a
-- repeated call), 0 where it was fenced.
local WORDS = 11
local worker, keep_ms, now = ARGV[1], tonumber(ARGV[2]), now_ms()
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory

local function retry(id, job, delay)
  if job.cancel or delay == 0 or (job.deadline > 0 and job.deadline <= now + delay) then
    return requeue(id, job, now, keep_ms)
  end
  set(job, 'state', 'scheduled')
  set(job, 'worker', nil)
  set(job, 'sid', nil)
  save(id, job)
  redis.call('PEXPIRE', $job .. id, text(job.qttl + delay + $slack_ms))
  redis.call('PEXPIRE', $body .. id, text(job.qttl + delay + $slack_ms))
  set_due(id, job, now + delay)
  count_depth(job, 1)
end

local function finish(job, id, outcome, payload, code, message, prompt, completion, cached, delay, dead)
  release(id, job)
  delay = tonumber(delay)
  if delay >= 0 then
    set(job, 'fails', job.fails + 1)
    set(job, 'code', code)
    set(job, 'message', message)
    return retry(id, job, delay)
  end
  set(job, 'prompt', prompt)
  set(job, 'completion', completion)
  set(job, 'cached', cached)
  credit(job, prompt + 2 * completion - job.cost)  -- the tenant was charged a guess at the claim
  local final = { state = outcome, payload = payload, code = code, message = message }
  if outcome == 'cancelled' then final = ENDS[job.cancel or 'cancelled'] end
  if dead == '1' then
    bury(id, job, now, final, keep_ms)
  else
    seal(id, job, now, final, keep_ms)
  end
end

local ids, replies = {}, {}
for i = 3, #ARGV, WORDS do ids[#ids + 1] = ARGV[i] end
local owned = redis.call('HMGET', $own .. worker, unpack(ids))
for i, id in ipairs(ids) do
  local at = 3 + (i - 1) * WORDS
  local attempt, mark = ARGV[at + 1], worker .. ' ' .. ARGV[at + 1]
  local job = owned[i] == attempt and load_job(id)
  if job and job.ended ~= mark then
    set(job, 'ended', mark)
    finish(job, id, unpack(ARGV, at + 2, at + WORDS - 1))
    replies[i] = 1
  else
    if owned[i] == attempt then put('hash', $own .. worker, id, false) end  -- the hash is gone, or it ended just now
    replies[i] = redis.call('HGET', $job .. id, 'ended') == mark and 1 or 0
  end
end
return replies
