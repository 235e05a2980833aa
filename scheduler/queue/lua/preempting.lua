-- Which batch jobs a worker hands back, so that the head which found no room gets in.

-- This worker's running batch jobs, the one that started last first.
local function batch_jobs(asker)
  local found = {}
  for _, id in ipairs(held(asker)) do
    local job = load_job(id)
    if job and job.class == 'batch' and job.state == 'running' and not job.cancel then
      local began = job['a:' .. job.attempt] or '0'
      found[#found + 1] = { id = id, rows = rows_of(asker, job), kv = job.kv, at = tonumber(string.match(began, '^%d+')) }
    end
  end
  table.sort(found, function(a, b) return a.at > b.at or (a.at == b.at and a.id > b.id) end)
  return found
end

-- Nobody is named where even all of them would not do, nor while stride finds that batch work got too little.
local function name_victims(asker, work, job)
  if job.class == 'batch' or #held(asker) == 0 then return {} end
  if work.class and not work.urgent and asker.reached >= asker.passes.batch then return {} end
  local rows, kv, ids = asker.rows, asker.kv, {}
  for _, batch in ipairs(batch_jobs(asker)) do
    ids[#ids + 1] = batch.id
    rows, kv = rows + batch.rows, kv + batch.kv
    local empty = #ids == #held(asker) and #asker.jobs == 0
    if rows_of(asker, job) <= rows and (empty or job.kv <= kv) then return ids end
  end
  return {}
end
