#!lua flags=no-writes
-- READ_ARRIVAL: what a run knows when a group arrives, in one trip.
-- KEYS  1 trainers (hash)  2 weights:<policy> (stream)  3 pools (hash)  4 lineage (hash)
--       5 lineage:old (hash)  6 served (sorted set)
-- ARGV  digests of where its sequences' generations may end
-- reply { the trainer's registration, newest version's entry if any, heartbeats of servers, whether
--         there are lineages (0 for none), a lineage or nil per digest, oldest version served of
--         late (-1: none) }
local trainers, weights, pools, lineage, old_lineage, served = unpack(KEYS)

local function find_lineages()
  local found = {}
  for first = 1, #ARGV, 1000 do -- Lua can't hand over many thousand arguments at once
    local last, missing = math.min(first + 999, #ARGV), false
    for i, record in ipairs(redis.call('HMGET', lineage, unpack(ARGV, first, last))) do
      found[first + i - 1] = record
      missing = missing or not record
    end
    if missing then
      for i, record in ipairs(redis.call('HMGET', old_lineage, unpack(ARGV, first, last))) do
        found[first + i - 1] = found[first + i - 1] or record
      end
    end
  end
  return found
end

local function oldest_served()
  local oldest = -1
  for _, version in ipairs(redis.call('ZRANGE', served, 0, -1)) do
    version = tonumber(version) -- nil for what was written by hand
    if version and (oldest < 0 or version < oldest) then oldest = version end
  end
  return oldest
end

return {
  redis.call('HGET', trainers, 'config'),
  redis.call('XREVRANGE', weights, '+', '-', 'COUNT', '1'),
  redis.call('HVALS', pools),
  redis.call('EXISTS', lineage, old_lineage),
  find_lineages(),
  oldest_served(),
}
