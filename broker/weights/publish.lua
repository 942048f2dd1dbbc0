#!lua flags=allow-oom
-- PUBLISH: append a version of a policy's weights, once, and never an older one.
-- KEYS  1 weights:<policy> (stream)
-- ARGV  1 version  2… the entry's fields and values
-- reply "published" | "already" | "older" (a newer version is there, and not this one)
local weights, version, ENTRY = KEYS[1], tonumber(ARGV[1]), 2
local id = ARGV[1] .. '-1'
local newest = redis.call('XREVRANGE', weights, '+', '-', 'COUNT', 1)[1]
if newest and tonumber(string.match(newest[1], '^%d+')) >= version then
  return #redis.call('XRANGE', weights, id, id) > 0 and 'already' or 'older'
end
redis.call('XADD', weights, id, unpack(ARGV, ENTRY))
return 'published'
