-- What happens to the jobs of a worker that is gone.

-- {id, job} of all that the worker runs, in the order in which they once were queued.
local function held_jobs(worker)
  local held = {}
  for _, id in ipairs(redis.call('HKEYS', $own .. worker)) do
    local job = load_job(id)
    if job and job.state == 'running' and job.worker == worker then
      local ms, seq = string.match(job.sid, '^(%d+)%-(%d+)')
      held[#held + 1] = { id = id, job = job, at = tonumber(ms), seq = tonumber(seq) }
    end
  end
  table.sort(held, function(a, b) return a.at < b.at or (a.at == b.at and a.seq < b.seq) end)
  return held
end

local function forget_worker(worker)
  settle()
  for _, stream in ipairs(redis.call('SMEMBERS', $touched .. worker)) do
    redis.pcall('XGROUP', 'DELCONSUMER', stream, $group, worker)
    local hold = $hold .. string.match(string.sub(stream, #($queue) + 1), '^[^:]+')
    if redis.call('GET', hold) == worker then redis.call('DEL', hold) end  -- it empties itself no more
  end
  redis.call('DEL', $own .. worker, $cancels .. worker, $lastclaim .. worker, $touched .. worker)
  redis.call('ZREM', $lease, worker)
end

-- One job lost with its worker. Returns what became of it: queued, cancelled, expired or dead.
local function lose(id, job, now, limits)
  set(job, 'lost', job.lost + 1)
  release(id, job)
  local over = job.lost >= limits.max_lost or job.lost + job.fails >= limits.max_attempts
  if over and not job.cancel then
    bury(id, job, now, ENDS.lost, limits.keep_ms)
    return 'dead'
  end
  return requeue(id, job, now, limits.keep_ms)
end

-- All jobs of a worker go on elsewhere. Returns counts by what became of them.
local function reap(worker, now, limits)
  local fates = { queued = 0, cancelled = 0, expired = 0, dead = 0 }
  for _, held in ipairs(held_jobs(worker)) do
    local fate = lose(held.id, held.job, now, limits)
    fates[fate] = fates[fate] + 1
  end
  forget_worker(worker)
  return fates
end
