#!lua flags=allow-oom
-- REPLACE_REGISTRATION: make these the run's registration, if the one that was judged is still the
-- registration.
-- KEYS  1 trainers (hash)
-- ARGV  1 the registration judged (JSON, '' for none)  2 the new one
--       3 steps its trainer has behind it
-- reply 1 | 0 (another was registered meanwhile: judge again)
local trainers = KEYS[1]
local judged, new, step_offset = unpack(ARGV)
if (redis.call('HGET', trainers, 'config') or '') ~= judged then return 0 end
redis.call('HSET', trainers, 'config', new, 'step_offset', step_offset)
return 1
