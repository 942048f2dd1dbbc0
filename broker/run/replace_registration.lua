#!lua flags=allow-oom
-- REPLACE_REGISTRATION: make these the run's registration, if the one that was judged is still the registration.
-- KEYS  1 trainers (hash)
-- ARGV  1 the registration judged (JSON, '' for none)  2 the new one  3 steps its trainer has behind it
-- reply 1 | 0 (another was registered meanwhile: judge again)
if (redis.call('HGET', KEYS[1], 'config') or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'config', ARGV[2], 'step_offset', ARGV[3])
return 1
