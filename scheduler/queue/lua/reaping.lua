-- What happens to the jobs of a worker that is gone.

local function forget_worker(worker)
  for _, stream in ipairs(redis.call('SMEMBERS', $touched .. worker)) do
    redis.pcall('XGROUP', 'DELCONSUMER', stream, $group, worker)
  end
  redis.call('DEL', $own .. worker, $cancels .. worker, $lastclaim .. worker, $touched .. worker)
  redis.call('ZREM', $lease, worker)
end

-- One job lost with its worker. Returns what became of it: queued, cancelled, expired or dead.
local function lose(id, job, now, ends, limits)
  job.lost = job.lost + 1
  release(id, job)
  redis.call('HSET', $job .. id, 'lost', job.lost)
  local over = job.lost >= limits.max_lost or job.lost + job.fails >= limits.max_attempts
  if over and not job.cancel then
    bury(id, job, now, ends.lost, limits.keep_ms)
    return 'dead'
  end
  return requeue(id, job, now, ends, limits.keep_ms)
end

-- All jobs of a worker go on elsewhere, oldest first. Returns counts by what became of them.
local function reap(worker, now, ends, limits)
  local fates = { queued = 0, cancelled = 0, expired = 0, dead = 0 }
  local ids = redis.call('HKEYS', $own .. worker)
  table.sort(ids)
  for _, id in ipairs(ids) do
    local job = load_job(id)
    if job and job.state == 'running' and job.worker == worker then
      local fate = lose(id, job, now, ends, limits)
      fates[fate] = fates[fate] + 1
    end
  end
  forget_worker(worker)
  return fates
end
