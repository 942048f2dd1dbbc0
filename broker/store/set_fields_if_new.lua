#!lua flags=allow-oom
-- SET_FIELDS_IF_NEW: set a field of a hash that has none of that name, even when Redis is full,
-- because what frees memory depends on it.
-- KEYS  1 any hash
-- ARGV  1 field  2 value
-- reply 1 | 0 (it has one, perhaps by a call whose reply was lost)
local hash = KEYS[1]
local field, value = unpack(ARGV)
return redis.call('HSETNX', hash, field, value)
