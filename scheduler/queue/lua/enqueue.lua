-- Accepts a job, or says why not. Reads come first; the first write is one that Redis refuses at maxmemory.
-- Returns {'created'|'attached'|'mismatch', job id}, {'full'|'memory', retry after ms} or {'draining'}.
local id, pool, class, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local body, idem, digest = ARGV[5], ARGV[6], ARGV[7]
local cost, kv, rows = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local qttl, cap, model = tonumber(ARGV[13]), tonumber(ARGV[14]), ARGV[15]
local now = now_ms()
local durable, batch, made = ARGV[16], ARGV[17], ARGV[18]
local wait = tonumber(ARGV[12])
local deadline = ARGV[11] == '0' and 0 or now + tonumber(ARGV[11])

-- A job that answers a repeated request: running or succeeded. One that failed or was cancelled may be tried anew.
local function answers(other)
  local seen = redis.call('HMGET', $job .. other, 'state', 'cancel')
  local state = seen[1]
  return (state == 'queued' or state == 'scheduled' or state == 'running' or state == 'succeeded') and not seen[2]
end

-- Time until a tenth of the class's backlog is gone, from the decayed count of its claims (time constant 30 s).
local function retry_after(waiting)
  local seen = redis.call('HMGET', $rate .. pool, 'at', class)
  local count = tonumber(seen[2] or 0) * math.exp((tonumber(seen[1] or now) - now) / 30000)
  if count < 0.01 then return 10000 end
  return math.max(1000, math.min(60000, math.ceil(waiting / 10 / (count / 30000))))
end

if idem ~= '' then
  local prior = redis.call('GET', $idem .. idem)
  if prior then
    local other, seen = string.match(prior, '^(%S+) (.*)')
    if seen ~= digest then return { 'mismatch', other } end
    if answers(other) then return { 'attached', other } end
  end
end
if redis.call('EXISTS', $job .. id) == 1 then return { 'created', id } end

local closed = redis.call('GET', $gate)
if (closed == 'batch' and class == 'batch') or (closed == 'normal' and class ~= 'high') then
  return { 'memory', 5000 }
end
if redis.call('HEXISTS', $paused, pool .. '|drain') == 1 then return { 'draining' } end
local waiting = tonumber(redis.call('HGET', $depth, pool .. '|' .. class) or 0)
if waiting >= cap then return { 'full', retry_after(waiting) } end

local job = { pool = pool, class = class, tenant = tenant, attempt = 0, lost = 0, qttl = qttl, deadline = deadline }
local keep = qttl + wait + $slack_ms
redis.call('HSET', $job .. id, 'state', 'scheduled', 'pool', pool, 'class', class, 'tenant', tenant, 'model', model,
  'cost', cost, 'kv', kv, 'rows', rows, 'qttl', qttl, 'deadline', deadline, 'created', now, 'attempt', 0, 'lost', 0,
  'fails', 0, 'handed', 0)
if durable == '1' or batch ~= '' then redis.call('HSET', $job .. id, 'durable', durable, 'batch', batch) end
redis.call('PEXPIRE', $job .. id, keep)
redis.call('SET', $body .. id, body, 'PX', keep)
redis.call('ZADD', $live, made, id)
redis.call('HINCRBY', $count, 'accepted', 1)
if idem ~= '' then redis.call('SET', $idem .. idem, id .. ' ' .. digest, 'PX', $idem_ms) end
count_depth(job, 1)
if wait > 0 then
  set_due(id, job, now + wait)
  if deadline > 0 then redis.call('ZADD', $deadlines, deadline, id) end
else
  make_ready(id, job, now)
end
return { 'created', id }
