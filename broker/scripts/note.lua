#!lua flags=allow-oom
-- NOTE: set fields of a hash, even when Redis is full, because what frees memory depends on them.
-- KEYS  1 any hash
-- ARGV  field, value, …
-- reply number of fields that are new
return redis.call('HSET', KEYS[1], unpack(ARGV))
