#!lua flags=no-writes
-- ARRIVE: what a run knows when a group arrives, in one trip.
-- KEYS  1 trainers (hash)  2 weights:<policy> (stream)  3 pools (hash)  4 lineage (hash)  5 lineage:old (hash)
--       6 served (sorted set)
-- ARGV  digests of where its sequences' generations may end
-- reply { the trainer's registration, newest version's entry if any, heartbeats of servers, whether there are lineages (0 for
--         none), a lineage or nil per digest, oldest version served of late (-1: none) }
local found = {}
for first = 1, #ARGV, 1000 do -- Lua can't hand over many thousand arguments at once
  local last, missing = math.min(first + 999, #ARGV), false
  for i, record in ipairs(redis.call('HMGET', KEYS[4], unpack(ARGV, first, last))) do
    found[first + i - 1] = record
    missing = missing or not record
  end
  if missing then
    for i, record in ipairs(redis.call('HMGET', KEYS[5], unpack(ARGV, first, last))) do
      found[first + i - 1] = found[first + i - 1] or record
    end
  end
end
local oldest = -1
for _, version in ipairs(redis.call('ZRANGE', KEYS[6], 0, -1)) do
  version = tonumber(version) -- nil for what was written by hand
  if version and (oldest < 0 or version < oldest) then oldest = version end
end
return {
  redis.call('HGET', KEYS[1], 'config'), redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', '1'),
  redis.call('HVALS', KEYS[3]), redis.call('EXISTS', KEYS[4], KEYS[5]), found, oldest,
}
