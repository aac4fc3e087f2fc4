// The load of the benchmark: sends requests over a number of connections, times each, and checks every answer.
//
//	load <plan.json >result.json
//
// A closed loop sends the next request of a connection when the last one is answered. With a rate, requests are due at
// fixed moments whatever the answers do, and the latency of one that had to wait for a free connection counts from the
// moment when it was due. Sending stops after the given time; what is under way then is waited for, so that there are
// exactly as many answers as requests.
//
// With refusals, an answer of 429 or 503 with Retry-After is no failure: it is counted and timed by itself.
//
// Answers are kept and checked after the load, so that checking costs nothing while it is measured. Only the standard
// library is used, and one processor (GOMAXPROCS 1), for what the load costs is missing to the shop.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http/httputil"
	"os"
	"runtime"
	"runtime/debug"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	answerTimeout  = 60 * time.Second
	maxBody        = 16 << 20
	maxFailures    = 5
	collectPercent = 400
)

// Plan is what is sent. Requests are chosen at random, each as likely as the others.
type Plan struct {
	Address     string    `json:"address"`
	Connections int       `json:"connections"`
	Seconds     float64   `json:"seconds"`
	Rate        float64   `json:"rate"`  // requests a second; 0: a closed loop
	Count       int64     `json:"count"` // how many requests at most; 0: as many as fit into the time
	Seed        int64     `json:"seed"`
	Refusals    bool      `json:"refusals"` // whether refusals are expected
	Sources     int       `json:"sources"`  // addresses of loopback that connections come from, in turns; 0: the usual one
	Requests    []Request `json:"requests"`
}

// Request is one of the requests. Creates: the answer is 201 and has an id of its own; else it is 200 and not empty.
type Request struct {
	Kind    string `json:"kind"`
	Method  string `json:"method"`
	Path    string `json:"path"`
	Body    string `json:"body"`
	Creates bool   `json:"creates"`
}

// Result is what came of it. Times are microseconds, unless their names say otherwise.
type Result struct {
	Requests    int64              `json:"requests"`
	Good        int64              `json:"good"`
	DistinctIDs int64              `json:"distinct_ids"`
	Failures    []string           `json:"failures"` // the first few of what was not good
	BeganAt     float64            `json:"began_at"` // Unix seconds
	Seconds     float64            `json:"seconds"`  // until the last answer
	LatencyUS   Latency            `json:"latency_us"`
	KindsUS     map[string]Latency `json:"kinds_us"`
	LoadCPUUS   float64            `json:"load_cpu_us"` // what sending a request cost the load itself
	Refused     int64              `json:"refused"`     // in none of the figures above but requests and load_cpu_us
	RefusedUS   Latency            `json:"refused_us"`
	KindsGood   map[string]int64   `json:"kinds_good"`
}

type Latency struct {
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`
	Max  float64 `json:"max"`
}

// answer is a timed answer. body is nil where it was equal to the first one of the same request.
type answer struct {
	request int
	status  int
	latency time.Duration
	body    []byte
	refused bool
}

type schedule struct {
	began time.Time
	end   time.Time
	next  atomic.Int64
}

func main() {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(collectPercent)
	var plan Plan
	input := json.NewDecoder(os.Stdin)
	if err := input.Decode(&plan); err != nil {
		log.Fatal(err)
	}
	if plan.Connections < 1 || len(plan.Requests) == 0 {
		log.Fatal("a plan has at least one connection and one request")
	}
	go func() { // the end of our input is the end of the benchmark
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	if err := json.NewEncoder(os.Stdout).Encode(run(plan)); err != nil {
		log.Fatal(err)
	}
}

func run(plan Plan) Result {
	workers := make([]*worker, plan.Connections)
	wire := encoded(plan)
	for i := range workers {
		workers[i] = &worker{plan: &plan, number: i, wire: wire, random: rand.New(rand.NewSource(plan.Seed<<16 + int64(i)))}
		workers[i].first = make([][]byte, len(plan.Requests))
		if err := workers[i].connect(); err != nil {
			workers[i].fail(err)
		}
	}
	cpu := cpuTime()
	began := time.Now()
	shared := &schedule{began: began, end: began.Add(time.Duration(plan.Seconds * float64(time.Second)))}
	var group sync.WaitGroup
	for _, w := range workers {
		group.Add(1)
		go func(w *worker) {
			defer group.Done()
			w.work(shared)
		}(w)
	}
	group.Wait()
	elapsed := time.Since(began)
	cpu = cpuTime() - cpu
	return summary(plan, workers, began, elapsed, cpu)
}

func encoded(plan Plan) [][]byte {
	wire := make([][]byte, len(plan.Requests))
	for i, r := range plan.Requests {
		head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.Path, plan.Address)
		if r.Body != "" {
			head += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(r.Body))
		}
		wire[i] = []byte(head + "\r\n" + r.Body)
	}
	return wire
}

// ----------------------------------------------------------------------------------------------------- one connection

type worker struct {
	plan     *Plan
	number   int
	wire     [][]byte
	random   *rand.Rand
	conn     net.Conn
	reader   *bufio.Reader
	buffer   []byte
	first    [][]byte // by request: the first answer, with which the others are compared
	answers  []answer
	sent     int64
	failures []string
}

func (w *worker) connect() error {
	dialer := net.Dialer{Timeout: answerTimeout}
	if w.plan.Sources > 0 {
		dialer.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(w.number%w.plan.Sources+1))}
	}
	conn, err := dialer.Dial("tcp", w.plan.Address)
	if err != nil {
		return err
	}
	w.conn, w.reader = conn, bufio.NewReaderSize(conn, 16<<10)
	return nil
}

func (w *worker) fail(err error) { w.failures = append(w.failures, err.Error()) }

func (w *worker) work(s *schedule) {
	if w.conn == nil {
		return
	}
	defer func() { w.conn.Close() }()
	for {
		due, more := w.due(s)
		if !more {
			return
		}
		request := w.random.Intn(len(w.wire))
		w.sent++
		status, body, closes, later, err := w.exchange(request)
		if err != nil {
			w.fail(err)
			return
		}
		took, refused := time.Since(due), w.plan.Refusals && later && (status == 429 || status == 503)
		if refused {
			body = nil
		} else {
			body = w.kept(request, body)
		}
		w.answers = append(w.answers, answer{request, status, took, body, refused})
		if closes {
			w.conn.Close()
			if err := w.connect(); err != nil {
				w.fail(err)
				return
			}
		}
	}
}

// due waits for the next request's moment. A request that had to wait for this connection is late by that time; what
// the timer adds to a connection that was free is not the shop's.
func (w *worker) due(s *schedule) (time.Time, bool) {
	n := s.next.Add(1) - 1
	if w.plan.Count > 0 && n >= w.plan.Count {
		return time.Time{}, false
	}
	now := time.Now()
	if w.plan.Rate == 0 {
		return now, now.Before(s.end)
	}
	due := s.began.Add(time.Duration(float64(n) / w.plan.Rate * float64(time.Second)))
	if !due.Before(s.end) {
		return time.Time{}, false
	}
	if now.After(due) {
		return due, true
	}
	time.Sleep(due.Sub(now))
	return time.Now(), true
}

// exchange sends a request and reads its answer. The body is valid until the next one; later: it has
// a Retry-After.
func (w *worker) exchange(request int) (status int, body []byte, closes, later bool, err error) {
	if err := w.conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return 0, nil, false, false, err
	}
	if _, err := w.conn.Write(w.wire[request]); err != nil {
		return 0, nil, false, false, err
	}
	line, err := w.reader.ReadSlice('\n')
	if err != nil {
		return 0, nil, false, false, err
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return 0, nil, false, false, fmt.Errorf("not HTTP/1.1: %q", line)
	}
	if status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return 0, nil, false, false, err
	}
	length, chunked := -1, false
	for {
		line, err := w.reader.ReadSlice('\n')
		if err != nil {
			return 0, nil, false, false, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if length, err = strconv.Atoi(string(value)); err != nil || length < 0 || length > maxBody {
				return 0, nil, false, false, fmt.Errorf("content-length %q", value)
			}
		case bytes.EqualFold(name, []byte("transfer-encoding")):
			chunked = bytes.EqualFold(value, []byte("chunked"))
		case bytes.EqualFold(name, []byte("connection")):
			closes = bytes.EqualFold(value, []byte("close"))
		case bytes.EqualFold(name, []byte("retry-after")):
			later = true
		}
	}
	switch {
	case chunked:
		whole, err := io.ReadAll(io.LimitReader(httputil.NewChunkedReader(w.reader), maxBody))
		if err != nil {
			return 0, nil, false, false, err
		}
		// The reader of chunks leaves the empty line behind the last one.
		if _, err := w.reader.ReadSlice('\n'); err != nil {
			return 0, nil, false, false, err
		}
		return status, whole, closes, later, nil
	case length < 0:
		return 0, nil, false, false, errors.New("an answer without a length")
	}
	if cap(w.buffer) < length {
		w.buffer = make([]byte, length)
	}
	body = w.buffer[:length]
	_, err = io.ReadFull(w.reader, body)
	return status, body, closes, later, err
}

// kept gives a copy of the body to check later; nil where it is equal to one that will be checked.
func (w *worker) kept(request int, body []byte) []byte {
	if w.plan.Requests[request].Creates {
		return bytes.Clone(body)
	}
	if w.first[request] != nil && bytes.Equal(body, w.first[request]) {
		return nil
	}
	w.first[request] = bytes.Clone(body)
	return w.first[request]
}

// ----------------------------------------------------------------------------------------------------- what came of it

func summary(plan Plan, workers []*worker, began time.Time, elapsed, cpu time.Duration) Result {
	result := Result{BeganAt: float64(began.UnixNano()) / 1e9, Seconds: elapsed.Seconds(), Failures: []string{}}
	ids := map[int64]struct{}{}
	var all, refused []time.Duration
	result.KindsGood = map[string]int64{}
	kinds := map[string][]time.Duration{}
	for _, w := range workers {
		result.Requests += w.sent
		for _, text := range w.failures {
			result.note(text)
		}
		for _, a := range w.answers {
			request := plan.Requests[a.request]
			if a.refused {
				refused = append(refused, a.latency)
				continue
			}
			all = append(all, a.latency)
			kinds[request.Kind] = append(kinds[request.Kind], a.latency)
			id, err := checked(request, a)
			if err != nil {
				result.note(fmt.Sprintf("%s %s: %v", request.Method, request.Path, err))
				continue
			}
			result.Good++
			result.KindsGood[request.Kind]++
			if request.Creates {
				ids[id] = struct{}{}
			}
		}
	}
	result.DistinctIDs = int64(len(ids))
	result.LatencyUS = latency(all)
	result.Refused, result.RefusedUS = int64(len(refused)), latency(refused)
	result.KindsUS = map[string]Latency{}
	for kind, values := range kinds {
		result.KindsUS[kind] = latency(values)
	}
	if result.Requests > 0 {
		result.LoadCPUUS = float64(cpu.Nanoseconds()) / 1e3 / float64(result.Requests)
	}
	return result
}

func (r *Result) note(text string) {
	if len(r.Failures) < maxFailures {
		r.Failures = append(r.Failures, text)
	}
}

// checked gives the id of what an answer says was created, or the reason why the answer is not good.
func checked(request Request, a answer) (int64, error) {
	expected := 200
	if request.Creates {
		expected = 201
	}
	if a.status != expected {
		return 0, fmt.Errorf("status %d: %.300s", a.status, a.body)
	}
	if !request.Creates {
		return 0, checkedPage(a.body)
	}
	var created struct {
		ID     int64  `json:"id"`
		Status string `json:"status"`
	}
	if err := json.Unmarshal(a.body, &created); err != nil {
		return 0, err
	}
	if created.ID < 1 || created.Status == "" {
		return 0, fmt.Errorf("no id or no status: %.300s", a.body)
	}
	return created.ID, nil
}

// checkedPage looks at one thing or a list of them. nil is a body that was the same as one that was looked at.
func checkedPage(body []byte) error {
	if body == nil {
		return nil
	}
	type thing struct {
		ID   int64  `json:"id"`
		Name string `json:"name"`
	}
	things := make([]thing, 1)
	var err error
	if strings.HasPrefix(string(body), "[") {
		err = json.Unmarshal(body, &things)
	} else {
		err = json.Unmarshal(body, &things[0])
	}
	if err != nil {
		return err
	}
	if len(things) == 0 {
		return errors.New("an empty list")
	}
	for _, t := range things {
		if t.ID < 1 || t.Name == "" {
			return fmt.Errorf("no id or no name: %.300s", body)
		}
	}
	return nil
}

func latency(values []time.Duration) Latency {
	if len(values) == 0 {
		return Latency{}
	}
	sort.Slice(values, func(i, j int) bool { return values[i] < values[j] })
	var sum time.Duration
	for _, v := range values {
		sum += v
	}
	at := func(share float64) float64 {
		return microseconds(values[min(len(values)-1, int(share*float64(len(values))))])
	}
	return Latency{
		Mean: microseconds(sum) / float64(len(values)),
		P50:  at(0.5), P90: at(0.9), P99: at(0.99), P999: at(0.999), Max: at(1),
	}
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
