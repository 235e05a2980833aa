-- Entries of a registry, ARGV[1] 'workers' or 'cards': an index of names, and one expiring key each. Names whose
-- entry expired are removed.
local index = ARGV[1] == 'workers' and $fleet or $pools
local entry = ARGV[1] == 'workers' and $worker or $card
redis.call('DEL', index .. ':none')  -- always allowed, so that the script passes at maxmemory
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', index)) do
  local value = redis.call('GET', entry .. name)
  if value then found[#found + 1] = value else redis.call('SREM', index, name) end
end
return found
