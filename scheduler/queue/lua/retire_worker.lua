-- A worker leaves cleanly: what it still holds is handed back, its lease and its traces go.
local worker, keep_ms, ends = ARGV[1], tonumber(ARGV[2]), ends_from(3)
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local now, ids = now_ms(), redis.call('HKEYS', $own .. worker)
table.sort(ids)
for _, id in ipairs(ids) do
  local job = load_job(id)
  if job and job.state == 'running' and job.worker == worker then
    release(id, job)
    redis.call('HSET', $job .. id, 'ended', worker .. ' ' .. job.attempt, 'handed', job.handed + 1)
    requeue(id, job, now, ends, keep_ms)
  end
end
forget_worker(worker)
return #ids
