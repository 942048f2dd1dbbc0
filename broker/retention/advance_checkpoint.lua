#!lua flags=allow-oom
-- ADVANCE_CHECKPOINT: note the newest step that a reader of the batches no longer needs; a late call never takes it back.
-- KEYS  1 batches (stream)  2 state (hash)
-- ARGV  1 reader (consumer group)  2 step
-- reply 1 | 0 (no such reader: it left, or its run was reset, and a mark would free what the next one needs)
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for _, reader in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  for i = 1, #reader, 2 do
    if reader[i] == 'name' and reader[i + 1] == ARGV[1] then
      local covered = tonumber(redis.call('HGET', KEYS[2], 'covered:' .. ARGV[1]) or '') or 0
      if covered < tonumber(ARGV[2]) then redis.call('HSET', KEYS[2], 'covered:' .. ARGV[1], ARGV[2]) end
      return 1
    end
  end
end
return 0
