#!lua flags=allow-oom
-- DELIVER: batches up to a step count as delivered: what was lent without counting is no longer told as queued.
-- KEYS  1 batches (stream)  2 state (hash)
-- ARGV  1 step
-- What is undelivered still is counted anew, so that nothing that was deleted by hand counts for ever.
-- reply 1 | 0 (they did already, or the step was never formed: its run was reset)
local step, groups, sequences = tonumber(ARGV[1]), 0, 0
local delivered = (tonumber(redis.call('HGET', KEYS[2], 'delivered') or '0') or 0)
if step <= delivered or step > (tonumber(redis.call('HGET', KEYS[2], 'formed') or '0') or 0) then return 0 end
local formed = tonumber(redis.call('HGET', KEYS[2], 'formed'))
for _, entry in ipairs(formed > step and redis.call('XRANGE', KEYS[1], (step + 1) .. '-0', '+') or {}) do
  for j = 1, #entry[2], 2 do
    if entry[2][j] == 'gids' then groups = groups + select(2, string.gsub(entry[2][j + 1], '%S+', '')) end
    if entry[2][j] == 'n' then sequences = sequences + (tonumber(entry[2][j + 1]) or 0) end
  end
end
redis.call('HSET', KEYS[2], 'delivered', step, 'undelivered_groups', groups, 'undelivered_sequences', string.format('%.0f', sequences))
return 1
