-- Accepts a job once more that ended without success and whose body is still there: same id, next attempt, all tries.
-- Returns false for an unknown job, else its state: 'queued', or the one in which it stays as nothing can be replayed.
local id = ARGV[1]
redis.call('PEXPIRE', $job .. id .. ':none', 0)  -- always allowed, so that the script passes at maxmemory
local job = load_job(id)
if not job then return false end
local hash, body, now = $job .. id, $body .. id, now_ms()
if not ENDED[job.state] or job.state == 'succeeded' or redis.call('EXISTS', body) == 0 then return job.state end

forget_dead_letter(id)
job.lost, job.fails, job.handed = 0, 0, 0
if job.deadline <= now then job.deadline = 0 end
redis.call('HDEL', hash, 'code', 'message', 'started', 'first', 'finished', 'prompt', 'completion', 'cached', 'worker',
  'cancel')
redis.call('HSET', hash, 'lost', 0, 'fails', 0, 'handed', 0, 'deadline', job.deadline)
redis.call('DEL', $log .. id)  -- it begins anew, not after what the failed tries said
redis.call('PEXPIRE', hash, job.qttl + $slack_ms)
redis.call('PEXPIRE', body, job.qttl + $slack_ms)
put('zset', $live, id, ARGV[2])
add($count, 'accepted', 1)
count_depth(job, 1)
make_ready(id, job, now, job.class)
return 'queued'
