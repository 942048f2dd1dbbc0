#!lua flags=allow-oom
-- CLOSE_STEP: the open step can't be trained as it is: what was computed of it counts for nothing,
-- and all meet anew, in the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)
--       4 control (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 why
-- reply "closed" | "moved" (another epoch, also after a call whose reply was lost)
--       | "other" (another step is open, or none)
-- Its batch stays lent to the replicas, if it is: whoever opens the next step sees what can be done
-- about it.
--- @include fence
--- @include log_event
local replicas, members, work, control = unpack(KEYS)
local id, generation, epoch, step, why = unpack(ARGV)
if not is_current(replicas, members, id, generation, epoch) then return 'moved' end
if redis.call('HGET', replicas, 'open') ~= step then return 'other' end

local next_epoch = redis.call('HINCRBY', replicas, 'epoch', 1)
redis.call('HDEL', replicas, 'open', 'groups')
redis.call('DEL', work)
local detail = 'step ' .. step .. ', epoch ' .. next_epoch .. ': ' .. why
log_event(control, 'event', 'closed', 'who', id, 'detail', detail)
return 'closed'
