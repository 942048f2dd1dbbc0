#!lua flags=allow-oom
-- FORM: move chosen groups from the queue into one batch, all or none.
-- KEYS  1 groups (stream)  2 batches (stream)  3 state (hash)
-- ARGV  1 step to form  2 sequences it must hold  3 number k of groups  4…3+k their ids in `groups`  then the batch's fields and values
-- reply "formed" | "conflict" (another replica was faster: choose again)
-- `gids` and the totals among the fields were read from the same entries, which never change.
local k = tonumber(ARGV[3])
if tonumber(redis.call('HGET', KEYS[3], 'formed') or '0') + 1 ~= tonumber(ARGV[1]) then return 'conflict' end
local chosen, total = {}, 0
for i = 1, k do
  local found = redis.call('XRANGE', KEYS[1], ARGV[3 + i], ARGV[3 + i])
  if #found == 0 then return 'conflict' end
  local entry, flat = {}, found[1][2]
  for j = 1, #flat, 2 do entry[flat[j]] = flat[j + 1] end
  chosen[i] = entry
  total = total + tonumber(entry.n)
end
if total ~= tonumber(ARGV[2]) then return 'conflict' end

redis.call('XADD', KEYS[2], ARGV[1] .. '-0', unpack(ARGV, 4 + k))
for i = 1, k do
  local entry = chosen[i]
  redis.call('XDEL', KEYS[1], ARGV[3 + i])
  redis.call('HINCRBY', KEYS[3], 'groups', -1)
  redis.call('HINCRBY', KEYS[3], 'sequences', '-' .. entry.n)
  redis.call('HINCRBY', KEYS[3], 'bytes', '-' .. entry.bytes)
  redis.call('HINCRBY', KEYS[3], 'size:' .. entry.n, -1)
  redis.call('HINCRBY', KEYS[3], 'env_groups:' .. entry.env, -1)
  redis.call('HINCRBY', KEYS[3], 'env_sequences:' .. entry.env, '-' .. entry.n)
  redis.call('HINCRBY', KEYS[3], 'env_bytes:' .. entry.env, '-' .. entry.bytes)
end
redis.call('HSET', KEYS[3], 'formed', ARGV[1])
return 'formed'
