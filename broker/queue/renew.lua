#!lua flags=allow-oom
-- RENEW: keep a lease alive without counting a delivery, but only for who holds it: XCLAIM alone would take it back.
-- KEYS  1 batches (stream)
-- ARGV  1 policy (consumer group)  2 consumer  3 step
-- reply "renewed" | "lost" (another consumer's by now, or committed)
local id = ARGV[3] .. '-0'
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 'lost' end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'IDLE', 0, 'JUSTID')
return 'renewed'
