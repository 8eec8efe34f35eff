-- What acme's accounts owe for $first_day to $last_day (days in New York, both included); account NULL is the total.
-- The rules stand here a second time on purpose: this is the figure that the bill is judged by.
WITH good AS (
    SELECT request_id, account_ref, calls
    FROM api_calls
    WHERE (requested_at AT TIME ZONE 'America/New_York')::DATE BETWEEN $first_day AND $last_day
      AND requested_at >= timezone('America/New_York', $bill_from::TIMESTAMP)
      AND account_ref BETWEEN 'acct-0001' AND 'acct-0012'
      AND calls >= 0
      AND calls = trunc(calls)
),
one_of_each AS (
    SELECT any_value(account_ref) AS account, any_value(calls) AS calls FROM good GROUP BY request_id
)
SELECT account, sum(calls) AS quantity
FROM one_of_each
GROUP BY ROLLUP (account)
ORDER BY account NULLS LAST;
