#!lua flags=no-writes
-- ARRIVE: what a run knows when a group arrives, in one trip.
-- KEYS  1 trainers (hash)  2 weights:<policy> (stream)  3 pools (hash)  4… lineage:<digest> of its sequences (strings)
-- reply { the trainer's registration, newest version's entry if any, heartbeats of servers, lineages }
local lineages = {}
for first = 4, #KEYS, 1000 do -- Lua can't hand over many thousand arguments at once
  for _, lineage in ipairs(redis.call('MGET', unpack(KEYS, first, math.min(first + 999, #KEYS)))) do
    lineages[#lineages + 1] = lineage
  end
end
return {
  redis.call('HGET', KEYS[1], 'config'), redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', '1'),
  redis.call('HVALS', KEYS[3]), lineages,
}
