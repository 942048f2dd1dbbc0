#!lua flags=allow-oom
-- SET_FIELDS: set fields of a hash, even when Redis is full, because what frees memory depends on
-- them.
-- KEYS  1 any hash
-- ARGV  field, value, …
-- reply number of fields that are new
local hash, new = KEYS[1], 0
for i = 1, #ARGV, 2 do new = new + redis.call('HSET', hash, ARGV[i], ARGV[i + 1]) end
return new
