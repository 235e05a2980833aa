-- Ids of live jobs, newest first, from below a creation time and id; looks at no more than 1,000.
-- ARGV: limit, before ms, before id ('': from the newest), then tenant, state, pool, class, batch ('': any).
-- Returns {ids, the last id looked at, or '' where no older one is left}.
local limit, before = tonumber(ARGV[1]), ARGV[3]
local wanted, found, last, looked = {}, {}, '', 0

local function matches(id)
  local seen = redis.call('HMGET', $job .. id, 'state', 'class', 'spec')
  if not seen[3] then return false end
  local job = { state = seen[1], class = seen[2] }
  read_spec(job, seen[3])
  for name, value in pairs(wanted) do
    if job[name] ~= value then return false end
  end
  return true
end

for i, name in ipairs({ 'tenant', 'state', 'pool', 'class', 'batch' }) do
  if ARGV[3 + i] ~= '' then wanted[name] = ARGV[3 + i] end
end
local rank = before == '' and 0 or redis.call('ZREVRANK', $live, before)
if not rank then
  rank = redis.call('ZCOUNT', $live, '(' .. ARGV[2], '+inf')  -- it is gone; others of its millisecond may be newer
elseif before ~= '' then
  rank = rank + 1
end
local ids = redis.call('ZREVRANGE', $live, rank, rank + 999)
for _, id in ipairs(ids) do
  last, looked = id, looked + 1
  if before == '' or id < before then
    if matches(id) then found[#found + 1] = id end
    if #found >= limit then break end
  end
end
return { found, (looked < #ids or #ids == 1000) and last or '' }
