#!lua
-- RECORD_LINEAGE: keep the lineage of finished generations; the oldest make room for the newest.
-- KEYS  1 lineage (hash)  2 lineage:old (hash)
-- ARGV  1 bytes that both may hold  2 seconds that a record is kept at most  3… digest and record in turn
-- reply number of records that had to go before their time
-- When the first has held half of the bytes, or half of the time, it takes the place of the second. Its fields `bytes`
-- and `since` tell how much it holds and since when; a digest, being 32 characters, is neither.
local OVERHEAD = 100 -- bytes of a field besides what is in it
local now, most, half = tonumber(redis.call('TIME')[1]), tonumber(ARGV[1]) / 2, tonumber(ARGV[2]) / 2
local held = tonumber(redis.call('HGET', KEYS[1], 'bytes') or '0')
local since = tonumber(redis.call('HGET', KEYS[1], 'since') or now)
local added, dropped = 0, 0
for i = 3, #ARGV, 2 do added = added + #ARGV[i] + #ARGV[i + 1] + OVERHEAD end

local full = held > 0 and held + added > most
if full or now - since >= half then
  if full then dropped = math.max(0, redis.call('HLEN', KEYS[2]) - 2) end
  redis.call('UNLINK', KEYS[2])
  redis.call('RENAME', KEYS[1], KEYS[2])
end
if redis.call('HSETNX', KEYS[1], 'since', now) == 1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
for i = 3, #ARGV, 2 do -- one that is there already is counted once
  local known = redis.call('HSTRLEN', KEYS[1], ARGV[i])
  if known > 0 then added = added - #ARGV[i] - known - OVERHEAD end
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('HINCRBY', KEYS[1], 'bytes', added)
return dropped
