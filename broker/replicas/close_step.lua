#!lua flags=allow-oom
-- CLOSE_STEP: the open step can't be trained as it is: what was computed of it counts for nothing, and all meet anew, in the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)  4 control (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 why
-- reply "closed" | "moved" (another epoch, also after a call whose reply was lost) | "other" (another step is open, or none)
-- Its batch stays lent to the replicas, if it is: whoever opens the next step sees what can be done about it.
-- include log_event
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'open')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 'moved' end
if found[3] ~= ARGV[4] then return 'other' end
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HDEL', KEYS[1], 'open', 'groups')
redis.call('DEL', KEYS[3])
log_event(KEYS[4], 'event', 'closed', 'who', ARGV[1], 'detail', 'step ' .. ARGV[4] .. ', epoch ' .. epoch .. ': ' .. ARGV[5])
return 'closed'
