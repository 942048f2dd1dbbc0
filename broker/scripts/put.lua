#!lua
-- PUT: make a stored blob part of the queue, once, if there is room for it.
-- KEYS  1 groups (stream)  2 blob:<gid> (string)  3 seen:<gid> (string)  4 state (hash)  5 trainers (hash)
--       6 weights:<policy> (stream)  7 pools (hash)  8 lineage (hash)  9 lineage:old (hash): only read where ARGV 8 says so
-- ARGV  1 seconds to remember the gid
--       2 bytes and 3 sequences that may be queued  4 bytes and 5 sequences of one environment (each 0: no limit)
--       6 steps that a group may be late, 0 for any, '' to leave it as it is  7 policy whose steps they are
--       8 1 if the sender has not asked, but believes that there are no servers and no lineages, and that the trainer's
--       registration and the newest version's entry id are 9 and 10 ('' for none)
--       11 env  12 n  13 bytes  14… the entry's fields and values
-- reply "stored" | "duplicate" | "noblob" (it expired: set it again) | "changed" (the sender believes what is not so)
--       | "late" (it would be trained too late) | "full" | "env_full" (over a quota of the queue, of its environment)
-- The blob arrives with a TTL, so that a crash before this script leaves nothing behind; here it loses it.
-- What waits alone always fits. The newest max_lag is kept for FORM's sake: every former knows it, whoever it is.
if redis.call('EXISTS', KEYS[3]) == 1 then return 'duplicate' end
if redis.call('EXISTS', KEYS[2]) == 0 then return 'noblob' end
if ARGV[8] == '1' then
  local newest = redis.call('XREVRANGE', KEYS[6], '+', '-', 'COUNT', '1')[1]
  if redis.call('EXISTS', KEYS[7], KEYS[8], KEYS[9]) > 0 or (redis.call('HGET', KEYS[5], 'config') or '') ~= ARGV[9]
      or (newest and newest[1] or '') ~= ARGV[10] then
    return 'changed'
  end
end
local max_lag, env, n, bytes = ARGV[6], ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])
local function counter(name) return tonumber(redis.call('HGET', KEYS[4], name) or '0') end
local function over(name, added, limit)
  local held = counter(name)
  return limit > 0 and held > 0 and held + added > limit
end

local config = max_lag ~= '' and max_lag ~= '0' and redis.call('HGET', KEYS[5], 'config')
local readable, known = pcall(cjson.decode, config or '')
local batch_size = readable and type(known) == 'table' and tonumber(known.batch_size)
if batch_size then
  local waiting = counter('sequences') + (counter('formed') - counter('delivered')) * batch_size
  if waiting >= max_lag * batch_size then return 'late' end
end
if over('bytes', bytes, tonumber(ARGV[2])) or over('sequences', n, tonumber(ARGV[3])) then return 'full' end
if over('env_bytes:' .. env, bytes, tonumber(ARGV[4])) or over('env_sequences:' .. env, n, tonumber(ARGV[5])) then
  return 'env_full'
end

redis.call('SET', KEYS[3], '1', 'EX', ARGV[1])
redis.call('PERSIST', KEYS[2])
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 14))
redis.call('HINCRBY', KEYS[4], 'accepted', 1)
redis.call('HINCRBY', KEYS[4], 'groups', 1)
redis.call('HINCRBY', KEYS[4], 'sequences', n)
redis.call('HINCRBY', KEYS[4], 'bytes', ARGV[13])
redis.call('HINCRBY', KEYS[4], 'env_sequences:' .. env, n)
redis.call('HINCRBY', KEYS[4], 'env_bytes:' .. env, ARGV[13])
redis.call('HINCRBY', KEYS[4], 'waiting:' .. env .. ':' .. n, 1)
if max_lag ~= '' then redis.call('HSET', KEYS[4], 'max_lag', max_lag, 'lag_of', ARGV[7]) end
return 'stored'
