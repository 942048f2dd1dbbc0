#!lua
-- RECORD_LINEAGE: keep the lineage of finished generations; the oldest make room for the newest.
-- KEYS  1 lineage (hash)  2 lineage:old (hash)
-- ARGV  1 bytes that both may hold  2 seconds that a record is kept at most
--       3… digest and record in turn
-- reply number of records that had to go before their time
-- When the first has held half of the bytes, or half of the time, it takes the place of the second.
-- Its fields `bytes` and `since` tell how much it holds and since when; a digest, being 32
-- characters, is neither.
local lineage, old_lineage = unpack(KEYS)
local most_bytes, kept_s = unpack(ARGV, 1, 2)
local RECORDS = 3
local OVERHEAD = 100 -- bytes of a field besides what is in it

local now = tonumber(redis.call('TIME')[1])
local held = tonumber(redis.call('HGET', lineage, 'bytes') or '0')
local since = tonumber(redis.call('HGET', lineage, 'since') or now)
local added, dropped = 0, 0
for i = RECORDS, #ARGV, 2 do added = added + #ARGV[i] + #ARGV[i + 1] + OVERHEAD end

local full = held > 0 and held + added > most_bytes / 2
if full or now - since >= kept_s / 2 then
  if full then dropped = math.max(0, redis.call('HLEN', old_lineage) - 2) end
  redis.call('UNLINK', old_lineage)
  redis.call('RENAME', lineage, old_lineage)
end
if redis.call('HSETNX', lineage, 'since', now) == 1 then
  redis.call('EXPIRE', lineage, kept_s)
end
for i = RECORDS, #ARGV, 2 do -- one that is there already is counted once
  local known = redis.call('HSTRLEN', lineage, ARGV[i])
  if known > 0 then added = added - #ARGV[i] - known - OVERHEAD end
  redis.call('HSET', lineage, ARGV[i], ARGV[i + 1])
end
redis.call('HINCRBY', lineage, 'bytes', added)
return dropped
