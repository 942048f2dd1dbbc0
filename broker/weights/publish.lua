#!lua flags=allow-oom
-- PUBLISH: append a version of a policy's weights, once, and never an older one.
-- KEYS  1 weights:<policy> (stream)
-- ARGV  1 version  2… the entry's fields and values
-- reply "published" | "already" | "older" (a newer version is there, and not this one)
local id = ARGV[1] .. '-1'
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if #newest > 0 and tonumber(string.match(newest[1][1], '^%d+')) >= tonumber(ARGV[1]) then
  return #redis.call('XRANGE', KEYS[1], id, id) > 0 and 'already' or 'older'
end
redis.call('XADD', KEYS[1], id, unpack(ARGV, 2))
return 'published'
