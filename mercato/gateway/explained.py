"""What each operation that changes something does, in sentences: at once, later, and what a client does next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXPLAINED: Final[Mapping[str, str]] = {
    "POST /register": "Opens an account for a customer with an e-mail address that no other account has. "
    "Where the shop sends letters, it sends one to the address, with a link by which its owner proves it. "
    "The answer has no token. Sign in with POST /login next.",
    "POST /login": "Checks an e-mail address, or the name of an account, and a password, and begins a session. "
    "The answer has an access token for 15 minutes and a refresh token for one use. "
    "Send the access token with each request, as `Authorization: Bearer ACCESS_TOKEN`. "
    "Before it expires, exchange the refresh token at POST /token/refresh.",
    "POST /token/refresh": "Exchanges a refresh token for new tokens of the same session. "
    "The old refresh token can be sent again for 30 seconds, by a client that got no answer. "
    "Sent later it ends the session, for it may have been stolen. "
    "Keep the new refresh token in place of the old one; after 401, sign in again.",
    "POST /logout": "Ends the session of a refresh token. "
    "Its access tokens are refused within seconds, by every process. "
    "The answer is the same for an unknown token. Delete both tokens next.",
    "POST /password/forgot": "Asks for a letter with a link by which a new password can be set. "
    "The answer, and the work before it, is the same whether or not there is such an account. "
    "The letter is sent after the answer. "
    "Its link leads to a page of the shop, which sends POST /password/reset.",
    "POST /password/reset": "Sets a new password by the token of a letter. "
    "Every session of the account ends, and the e-mail address counts as proven. "
    "With the same password it may be sent again. Sign in with POST /login next.",
    "POST /email/proof": "Proves an e-mail address by the token of a letter. "
    "From then on the account has `email_proven`. "
    "Orders that its owner placed as a guest can then be claimed with POST /orders/{id}/claim.",
    "POST /users/me/proof": "Asks for another letter with a link by which your address can be proven. "
    "It is sent after the answer. The link leads to a page of the shop, which sends POST /email/proof.",
    "PATCH /users/me": "Changes your name, your e-mail address or both; other fields stay. "
    "Another address needs `current_password`, and is not proven until its owner follows the link of a letter. "
    "With If-Match it is done only at the version that you have seen. "
    "The answer has the account as it is now, with its new ETag.",
    "POST /users/me/password": "Sets another password; the body must have the current one. "
    "Every session ends but that of the `refresh_token` in the body. "
    "Access tokens of the ended sessions are refused within seconds. Sign in again where it was not given.",
    "DELETE /users/me/sessions": "Ends all your sessions but the one whose access token asks. "
    "Their access tokens are refused within seconds, and their refresh tokens at once. "
    "GET /users/me/sessions lists the sessions that have not ended.",
    "DELETE /users/me/sessions/{id}": "Ends one of your sessions, by the id that GET /users/me/sessions gives. "
    "Its refresh token is refused at once, and its access tokens within seconds. "
    "It may be the session of this request: sign in again then.",
    "DELETE /users/me": "Erases your account for ever, after checking the password. "
    "Your name, address and sessions are deleted; orders and payments stay, under an id that leads to no person. "
    "It cannot be undone, and may be sent again. "
    "Read GET /users/me/export first if you want to keep your data.",
    "PATCH /users/{id}": "Changes the name or e-mail address of an account: your own, or any for staff. "
    "Other fields stay. Another address of your own needs `current_password`. "
    "With If-Match it is done only at the version that you have seen. "
    "The answer has the account as it is now, with its new ETag.",
    "PUT /users/{id}/role": "Makes an account staff, or a customer. "
    "Where that changes its role, all its sessions end, and its owner signs in again. "
    "The last member of staff cannot lose the role. It may be sent again: the role then does not change.",
    "POST /products": "Adds a product to the catalogue under a sku that no other product has. "
    "It is found by searches at once, with no stock. "
    "Say how many pieces there are with PUT /products/{id}/stock next. Without a currency, the price is in the shop's.",
    "PATCH /products/{id}": "Changes the fields that are sent; the rest stays. "
    "Orders keep the price that they were placed with; new orders get the new price. "
    "A buyer who still sends the old total is refused with `orders.price_changed`. "
    "With If-Match it is done only at the version that you have seen.",
    "POST /products/{id}/archive": "Takes a product out of the catalogue. "
    "It can be read by its id, but not ordered. "
    "Orders of it are not affected. It may be sent again: the product stays archived.",
    "POST /products/{id}/restore": "Puts an archived product back into the catalogue. "
    "It is found by searches again, and can be ordered. "
    "It keeps its price and its stock. It may be sent again: the product stays in the catalogue.",
    "PUT /products/{id}/stock": "Sets how many pieces of a product were counted. "
    "Count the pieces that open orders hold too; fewer than they hold are refused. "
    "With If-Match it is done only where nothing has changed since you looked. "
    "For goods that arrive or break, POST /products/{id}/stock/adjustments is safer.",
    "POST /products/{id}/stock/adjustments": "Adds pieces to the stock of a product, or takes some away. "
    "It needs an Idempotency-Key: sent again with its key it is done once, and answered the same for a day. "
    "Fewer pieces than open orders hold are refused. "
    "The answer has the level as it is now.",
    "POST /orders": "Places an order at the prices of the catalogue. "
    "201 means accepted: the order is stored and `pending`, and no stock is reserved and no money taken yet. "
    "Right after the answer the shop reserves the stock and, with `payment_method`, takes the money; without it the "
    "order waits for POST /payments. "
    "Without enough stock the order becomes `cancelled`, with a `reason`. "
    "Read GET /orders/{id} until its `status` and `payment` are final, or send `Prefer: wait=5` to have the answer "
    "wait for that. "
    "When no answer comes, send the same request with the same Idempotency-Key again: it is one order.",
    "PATCH /orders/{id}": "Moves an order to its next `status`, its next `fulfilment`, or both. "
    "Confirming an order that is not paid sells it on account: its stock is taken at once. "
    "A move that is not legal is refused, and `details.legal` lists those that are. "
    "With If-Match it is done only at the version that you have seen.",
    "POST /orders/{id}/cancel": "Cancels an order that has not been shipped. "
    "Its stock is released, and what was authorized or paid goes back; a refund may take a while. "
    "While a payment is in progress it is refused: send it again in a moment. "
    "Read GET /orders/{id} next: `payment` says whether the money is back.",
    "POST /orders/{id}/claim": "Moves an order that you placed as a guest to your account. "
    "It takes the access token of the order, and an account whose e-mail address is proven. "
    "An order that names an address must name that one. "
    "The access token of the order is not valid any more. GET /orders lists the order from then on.",
    "POST /orders/{id}/returns": "Takes goods of a delivered order back: all, or the `items` that are named. "
    "They are added to the stock at once, and what was paid for them is refunded after that. "
    "It needs an Idempotency-Key: sent again with its key it is done once. "
    "Read GET /refunds/{id} until `status` is no longer `pending`.",
    "POST /payments": "Pays an order that waits for its money. "
    "The answer comes when the provider has answered, or with a payment that is `pending` where it takes longer. "
    "A declined payment is 402: no money has moved, and the order can be paid with another method while its stock is "
    "held. "
    "When no answer comes, send the same request with the same Idempotency-Key again: no card is charged twice. "
    "With `capture: false` staff only authorize the amount, and take it later with POST /payments/{id}/capture.",
    "POST /payments/process": "Pays an order that waits for its money, by query parameters. "
    "It is another form of POST /payments, with the same rules. "
    "A declined payment is 402, and the order can be paid with another method. "
    "When no answer comes, send the same request with the same Idempotency-Key again.",
    "POST /payments/{id}/refunds": "Refunds money of a payment: all that is left, or the `amount`. "
    "It needs an Idempotency-Key: sent again with its key it is done once. "
    "The provider may take a while; meanwhile the refund is `pending`. "
    "Read GET /refunds/{id} until it has `succeeded` or was `declined`.",
    "POST /payments/{id}/capture": "Takes the money of a payment that was only authorized: all, or the `amount`. "
    "The rest is released, and is not due any more. "
    "A payment is captured once: afterwards another amount is refused. "
    "The answer has the payment as it is now.",
    "POST /payments/{id}/void": "Releases an authorized amount, and cancels its order. "
    "The stock of the order is released. "
    "A captured payment cannot be voided: refund it.",
    "GET /events": "Answers with a page. With `Accept: text/event-stream` it answers with a stream of Server-Sent "
    "Events instead, which begins at the end of the feed, or after `after`, and has no end of its own. "
    "A comment with the position comes every 15 seconds where there is nothing else. "
    "The stream ends with the access token, when the process stops, and after about an hour: come back with "
    "Last-Event-ID, and nothing is missed.",
    "GET /orders/{id}/events": "A stream of Server-Sent Events about one order. Its first message, `order`, is the "
    "order as GET /orders/{id} answers it; the others are events, by their types. "
    "An event may come that the first message already contains: its `version` is not higher then. "
    "A comment with the position comes every 15 seconds where there is nothing else. "
    "The stream ends with the access token, when the process stops, and after about an hour: come back with "
    "Last-Event-ID, and nothing is missed.",
}
