#!lua
-- KEEP_REFUSED: keep a refused post for whoever wants to know why, once, and count it.
-- KEYS  1 refused (stream)  2 blob:refused-<gid> (string)  3 state (hash)
-- ARGV  1 its body, compressed  2 seconds to keep it  3 letters to keep
--       4 bytes of all bodies to keep  5 share of maxmemory above which none is kept
--       6… the entry's fields and values
-- reply 1 | 0 (it is kept already) | -1 (Redis has no room to spare: it is only counted)
--- @include refused
local refused, blob, state = unpack(KEYS)
local body, keep_s, letters_kept, most_bytes, roomy = unpack(ARGV, 1, 5)
local ENTRY = 6

local function is_nearly_full()
  local reply = redis.pcall('INFO', 'memory')
  local memory = reply.err or reply -- an error where the user may not ask
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  return used and most and most > 0 and used > most * roomy
end

if redis.call('EXISTS', blob) == 1 then return 0 end
redis.call('HINCRBY', state, 'refused', 1)
if is_nearly_full() then
  redis.call('HINCRBY', state, 'refused_not_kept', 1)
  return -1
end
if #body > tonumber(most_bytes) then body = '' end
local since = redis.call('TIME')[1] * 1000 - keep_s * 1000
trim_letters(refused, letters_kept - 1, since, most_bytes - #body)
redis.call('SET', blob, body, 'EX', keep_s)
redis.call('XADD', refused, '*', 'kept', #body, unpack(ARGV, ENTRY))
count_kept(refused, #body)
return 1
