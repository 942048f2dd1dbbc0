#!lua
-- KEEP_REFUSED: keep a refused post for whoever wants to know why, once, and count it.
-- KEYS  1 refused (stream)  2 blob:refused-<gid> (string)  3 state (hash)
-- ARGV  1 its body, compressed  2 seconds to keep it  3 letters to keep  4 bytes of all bodies to keep
--       5 share of maxmemory above which none is kept  6… the entry's fields and values
-- reply 1 | 0 (it is kept already) | -1 (Redis has no room to spare: it is only counted)
-- include refused
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('HINCRBY', KEYS[3], 'refused', 1)
local memory = redis.pcall('INFO', 'memory') -- an error where the user may not ask
local used, most = string.match(memory.err or memory, 'used_memory:(%d+)'), string.match(memory.err or memory, 'maxmemory:(%d+)')
if used and most and tonumber(most) > 0 and tonumber(used) > tonumber(most) * ARGV[5] then
  redis.call('HINCRBY', KEYS[3], 'refused_not_kept', 1)
  return -1
end
local kept, limit = #ARGV[1], tonumber(ARGV[4])
if kept > limit then kept = 0 end
trim_letters(KEYS[1], ARGV[3] - 1, redis.call('TIME')[1] * 1000 - ARGV[2] * 1000, limit - kept)
redis.call('SET', KEYS[2], kept > 0 and ARGV[1] or '', 'EX', ARGV[2])
redis.call('XADD', KEYS[1], '*', 'kept', kept, unpack(ARGV, 6))
count_kept(KEYS[1], kept)
return 1
