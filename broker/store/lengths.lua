#!lua flags=no-writes
-- LENGTHS: how many bytes some strings hold.
-- KEYS  any strings
-- reply the bytes of each, 0 where there is none
local lengths = {}
for i, key in ipairs(KEYS) do lengths[i] = redis.call('STRLEN', key) end
return lengths
