#!lua flags=allow-oom
-- ADVANCE_CHECKPOINT: note the newest step that a reader of the batches no longer needs; a late
-- call never takes it back.
-- KEYS  1 batches (stream)  2 state (hash)
-- ARGV  1 reader (consumer group)  2 step
-- reply 1 | 0 (no such reader: it left, or its run was reset, and a mark would free what the next
--       one needs)
--- @include readers
local batches, state = unpack(KEYS)
local name, step = unpack(ARGV)
local field = 'covered:' .. name
for _, reader in ipairs(readers_of(batches)) do
  if reader.name == name then
    local covered = tonumber(redis.call('HGET', state, field) or '') or 0
    if covered < tonumber(step) then redis.call('HSET', state, field, step) end
    return 1
  end
end
return 0
