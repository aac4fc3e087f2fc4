// Places, reads and misplaces an order by the types that were made of the description. Argument: the shop's URL.
import type { components, paths } from "./api";

type Place = paths["/orders"]["post"]["requestBody"]["content"]["application/json"];
type Refused = paths["/orders"]["post"]["responses"][409]["content"]["application/problem+json"];
type Order = components["schemas"]["OrderOut"];
declare const process: { argv: string[] };

// What has a default may be left out.
const wanted: Place = { user_id: 1, product_id: 100 };
const item: components["schemas"]["ItemIn"] = { product_id: 1 };
// @ts-expect-error a misspelt field
const misspelt: components["schemas"]["ItemIn"] = { product_id: 1, qty: 1 };
// @ts-expect-error no currency
const currency: components["schemas"]["CurrencyCode"] = "XXX";
// @ts-expect-error the code of another operation
const another: Refused["code"] = "products.sku_taken";

function show(problem: Refused): string {
  const actual: unknown = problem.details?.["actual"];
  switch (problem.code) {
    case "orders.price_changed":
      return `changed to ${(actual as components["schemas"]["Money"]).amount}`;
    default:
      return problem.detail;
  }
}

async function place(body: Place): Promise<Order | Refused> {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(`${process.argv[2]}/orders`, { method: "POST", headers, body: JSON.stringify(body) });
  return (await answer.json()) as Order | Refused;
}

async function buy(): Promise<void> {
  const placed = await place(wanted);
  if (!("id" in placed)) throw new Error(placed.detail);
  const refused = await place({ ...wanted, amount: "0.01" });
  if (!("code" in refused)) throw new Error("it was taken");
  console.log(`${placed.items[0]?.sku} ${placed.total.amount}, ${show(refused)}`);
}

void buy();
void [item, misspelt, currency, another];
