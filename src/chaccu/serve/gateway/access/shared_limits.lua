-- One key's limits, as several gateways share them: one call gives back, then takes. Time is the server's.
-- KEYS[1] is a hash: the levels r (requests) and t (tokens) as of `at`, and of each gateway `g:ID`, the slots it has and until when.
-- ARGV: gateway, milliseconds that its slots last; limits (0: none) of requests, tokens, slots; requests and tokens given back
-- (negative: a debt); requests wanted, and more if there are; the same of tokens, of slots; slots had, whether that is so for
-- certain (1) or only where nothing is known (0).
-- Returns what was taken of requests, tokens, slots, then the slots of others and the two levels. What is wanted is taken
-- together or not at all.
local gateway = ARGV[1]
local a = {}
for index = 2, #ARGV do a[index] = tonumber(ARGV[index]) end
local lasts_ms, requests_limit, tokens_limit, slots_limit = a[2], a[3], a[4], a[5]

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local kept, fields = {}, redis.call('HGETALL', KEYS[1])
for index = 1, #fields, 2 do kept[fields[index]] = fields[index + 1] end
local passed_ms = math.max(0, now_ms - (tonumber(kept['at']) or now_ms))

local function level(name, per_minute, given_back)
  local before = tonumber(kept[name]) or per_minute
  return math.min(per_minute, before + passed_ms * per_minute / 60000 + given_back)
end

local requests, tokens = level('r', requests_limit, a[6]), level('t', tokens_limit, a[7])
local others, mine = 0, nil
for name, value in pairs(kept) do
  local holder = string.match(name, '^g:(.*)$')
  if holder then
    local count, until_ms = string.match(value, '^(%d+):(%d+)$')
    if tonumber(until_ms) <= now_ms then
      redis.call('HDEL', KEYS[1], name)
    elseif holder == gateway then
      mine = tonumber(count)
    else
      others = others + tonumber(count)
    end
  end
end
if mine == nil or a[15] == 1 then mine = a[14] end

-- Below a millionth, what is missing is rounding.
local function has(limit, left, wanted) return limit == 0 or wanted == 0 or left + 1e-6 >= wanted end
local slots = slots_limit - others - mine
local got_requests, got_tokens, got_slots = 0, 0, 0
if has(requests_limit, requests, a[8]) and has(tokens_limit, tokens, a[10]) and has(slots_limit, slots, a[12]) then
  local function take(limit, left, wanted, more)
    if limit == 0 then return 0 end
    return wanted + math.max(0, math.min(more, left - wanted))
  end
  got_requests = take(requests_limit, requests, a[8], a[9])
  got_tokens = take(tokens_limit, tokens, a[10], a[11])
  got_slots = take(slots_limit, slots, a[12], a[13])
end
requests, tokens, mine = requests - got_requests, tokens - got_tokens, mine + got_slots

redis.call('HSET', KEYS[1], 'at', string.format('%d', now_ms))
local full_ms = lasts_ms
local function keep(name, limit, left)
  if limit > 0 then
    redis.call('HSET', KEYS[1], name, string.format('%.6f', left))
    full_ms = math.max(full_ms, (limit - left) * 60000 / limit)
  end
end
keep('r', requests_limit, requests)
keep('t', tokens_limit, tokens)
if slots_limit > 0 then
  if mine > 0 then
    redis.call('HSET', KEYS[1], 'g:' .. gateway, string.format('%d:%d', mine, now_ms + lasts_ms))
  else
    redis.call('HDEL', KEYS[1], 'g:' .. gateway)
  end
end
-- Once all is full and free there is nothing to remember.
redis.call('PEXPIRE', KEYS[1], string.format('%d', math.ceil(full_ms) + 1000))
return {
  string.format('%.6f', got_requests), string.format('%.6f', got_tokens), got_slots, others,
  string.format('%.6f', requests), string.format('%.6f', tokens),
}
