"""Streams of events (Server-Sent Events): `GET /events` and `GET /orders/{id}/events` with `Accept: text/event-stream`.

    events service ──(one reader a process)──► SharedFeed ──► Stream ──► client
            ▲                                                   │
            └───────── pages with the filter of one stream ─────┘  behind: just begun, come back, or slow

`entries.py`   how an entry is shown, and which of them a stream wants.
`feed.py`      `SharedFeed`: reads the feed once for all streams of the process, while there are any.
`stream.py`    `Stream`: what is sent to one client.
`limits.py`    the bounds, and the places of clients within them.
`opening.py`   `Streams`: opens a stream for a request, and looks after the open ones.

A stream is *live*, and gets the entries of `SharedFeed`, or *behind*, and reads them from the feed by its position. A
live stream whose client takes less than there is falls behind as soon as `buffer_bytes` wait for it, and what waits no
further is not kept. It is live again as soon as it has reached what `SharedFeed` remembers.

Guaranteed
    - A stream has the entries that it wants in the order of the feed, each once, without a gap after the position with
      which it began. That position is an event id of an earlier stream, of any process.
    - No stream waits for the client of another one.
    - What is kept for a stream is bounded, and so is what is kept for all.
"""
