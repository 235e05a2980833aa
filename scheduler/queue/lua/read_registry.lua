-- Entries of a registry (a set of names, one expiring key each); names whose entry expired are removed.
local index, entry = P .. ARGV[1], P .. ARGV[2]
redis.call('DEL', index .. ':none')
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', index)) do
  local value = redis.call('GET', entry .. name)
  if value then found[#found + 1] = value else redis.call('SREM', index, name) end
end
return found
