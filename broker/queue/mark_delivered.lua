#!lua flags=allow-oom
-- MARK_DELIVERED: batches up to a step count as delivered: what was lent without counting is no
-- longer told as queued.
-- KEYS  1 batches (stream)  2 state (hash)
-- ARGV  1 step
-- reply 1 | 0 (they did already, or the step was never formed: its run was reset)
--- @include delivered
local batches, state = unpack(KEYS)
local step = tonumber(ARGV[1])
if step > (tonumber(redis.call('HGET', state, 'formed') or '') or 0) then return 0 end
return deliver(batches, state, step)
