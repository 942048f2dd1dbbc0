-- Milliseconds since 1970 by Redis's clock.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A number of them as text: Lua writes large ones with an exponent.
local function whole(number) return string.format('%.0f', number) end
