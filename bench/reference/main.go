// What the benchmark compares Mercato with: a small shop of four processes as they are usually written in Go.
//
//	reference users|products|orders|gateway
//
// The gateway forwards to the services over HTTP. POST /orders checks the user, checks the product and inserts the
// order: one statement each, prepared, from a pool of connections. There is no idempotency, no stock, no price, no
// payment and no event. GET /products lists a page, searches (?q=) or gives one product (/products/ID).
//
// Each process reads DSN (its database) and the addresses USERS, PRODUCTS, ORDERS and GATEWAY from the environment. It
// ends when its standard input does, so that it never outlives the benchmark.
package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	_ "github.com/lib/pq"
)

const (
	maxConnections = 20
	maxIdlePerHost = 256
	timeout        = 30 * time.Second
	pageLimit      = 200
)

type Order struct {
	ID        int64     `json:"id"`
	UserID    int64     `json:"user_id"`
	ProductID int64     `json:"product_id"`
	Amount    int64     `json:"amount"`
	Status    string    `json:"status"`
	CreatedAt time.Time `json:"created_at"`
}

// Named is what an order's checks ask for: a user or a product, without the rest of it.
type Named struct {
	ID   int64  `json:"id"`
	Name string `json:"name"`
}

type Product struct {
	ID          int64     `json:"id"`
	SKU         string    `json:"sku"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	PriceMinor  int64     `json:"price_minor"`
	Currency    string    `json:"currency"`
	Category    string    `json:"category"`
	Status      string    `json:"status"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

const productColumns = "id, sku, name, description, price_minor, currency, category, status, created_at, updated_at"

var client = &http.Client{
	Timeout:   timeout,
	Transport: &http.Transport{MaxIdleConns: 4 * maxIdlePerHost, MaxIdleConnsPerHost: maxIdlePerHost},
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: reference users|products|orders|gateway")
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	mux := http.NewServeMux()
	switch os.Args[1] {
	case "users":
		serveUsers(mux)
		listen("USERS", mux)
	case "products":
		serveProducts(mux)
		listen("PRODUCTS", mux)
	case "orders":
		serveOrders(mux)
		listen("ORDERS", mux)
	case "gateway":
		serveGateway(mux)
		listen("GATEWAY", mux)
	default:
		log.Fatalf("there is no service %q", os.Args[1])
	}
}

func listen(variable string, mux *http.ServeMux) {
	log.Fatal(http.ListenAndServe(os.Getenv(variable), mux))
}

// ---------------------------------------------------------------------------------------------------------- services

func serveUsers(mux *http.ServeMux) {
	serveNames(mux, database(), "users")
}

func serveNames(mux *http.ServeMux, db *sql.DB, table string) {
	statement := prepare(db, "SELECT id, name FROM "+table+" WHERE id = $1")
	mux.HandleFunc("/name", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseInt(r.URL.Query().Get("id"), 10, 64)
		if err != nil {
			http.Error(w, "invalid id", http.StatusBadRequest)
			return
		}
		var named Named
		if err := statement.QueryRowContext(r.Context(), id).Scan(&named.ID, &named.Name); err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, named)
	})
}

func serveProducts(mux *http.ServeMux) {
	db := database()
	serveNames(mux, db, "products")
	get := prepare(db, "SELECT "+productColumns+" FROM products WHERE id = $1")
	list := prepare(db, "SELECT "+productColumns+" FROM products WHERE id > $1 ORDER BY id LIMIT $2")
	search := prepare(db, "SELECT "+productColumns+` FROM products, websearch_to_tsquery('english', $1) query
		WHERE search @@ query ORDER BY ts_rank(search, query) DESC, id LIMIT $2`)
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseInt(r.URL.Query().Get("id"), 10, 64)
		if err != nil {
			http.Error(w, "invalid id", http.StatusBadRequest)
			return
		}
		product, err := scanProduct(get.QueryRowContext(r.Context(), id))
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, product)
	})
	mux.HandleFunc("/list", func(w http.ResponseWriter, r *http.Request) {
		after, limit, err := page(r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var products []Product
		if text := r.URL.Query().Get("q"); text != "" {
			products, err = queryProducts(r.Context(), search, text, limit)
		} else {
			products, err = queryProducts(r.Context(), list, after, limit)
		}
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, products)
	})
}

func serveOrders(mux *http.ServeMux) {
	insert := prepare(database(), `INSERT INTO orders (user_id, product_id, amount, status, created_at)
		VALUES ($1, $2, $3, $4, $5) RETURNING id, user_id, product_id, amount, status, created_at`)
	mux.HandleFunc("/create", func(w http.ResponseWriter, r *http.Request) {
		var order Order
		if err := json.NewDecoder(r.Body).Decode(&order); err != nil {
			http.Error(w, "invalid request", http.StatusBadRequest)
			return
		}
		var user, product Named
		if err := fetch(r.Context(), address("USERS", "/name?id=%d", order.UserID), &user); err != nil {
			fail(w, err)
			return
		}
		if err := fetch(r.Context(), address("PRODUCTS", "/name?id=%d", order.ProductID), &product); err != nil {
			fail(w, err)
			return
		}
		row := insert.QueryRowContext(r.Context(), order.UserID, order.ProductID, order.Amount, "pending", time.Now())
		err := row.Scan(&order.ID, &order.UserID, &order.ProductID, &order.Amount, &order.Status, &order.CreatedAt)
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusCreated, order)
	})
}

// ----------------------------------------------------------------------------------------------------------- gateway

func serveGateway(mux *http.ServeMux) {
	mux.HandleFunc("/orders", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			UserID    int64 `json:"user_id"`
			ProductID int64 `json:"product_id"`
			Amount    int64 `json:"amount"`
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			http.Error(w, "invalid request", http.StatusBadRequest)
			return
		}
		var order Order
		if err := create(r.Context(), address("ORDERS", "/create"), in, &order); err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusCreated, order)
	})
	mux.HandleFunc("/products", func(w http.ResponseWriter, r *http.Request) {
		var products []Product
		if err := fetch(r.Context(), address("PRODUCTS", "/list?%s", r.URL.Query().Encode()), &products); err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, products)
	})
	mux.HandleFunc("/products/", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseInt(strings.TrimPrefix(r.URL.Path, "/products/"), 10, 64)
		if err != nil {
			http.Error(w, "invalid id", http.StatusBadRequest)
			return
		}
		var product Product
		if err := fetch(r.Context(), address("PRODUCTS", "/get?id=%d", id), &product); err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, product)
	})
}

// ------------------------------------------------------------------------------------------------------------- parts

// refused is an answer of another service that is not the expected one.
type refused struct {
	status int
	text   string
}

func (r refused) Error() string { return r.text }

func address(variable, path string, values ...any) string {
	return "http://" + os.Getenv(variable) + fmt.Sprintf(path, values...)
}

func fetch(ctx context.Context, address string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	return exchange(request, http.StatusOK, into)
}

func create(ctx context.Context, address string, value, into any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	return exchange(request, http.StatusCreated, into)
}

func exchange(request *http.Request, expected int, into any) error {
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != expected {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1024))
		return refused{response.StatusCode, strings.TrimSpace(string(text))}
	}
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		return err
	}
	// What is read to its end leaves the connection to the next request.
	_, err = io.Copy(io.Discard, response.Body)
	return err
}

func fail(w http.ResponseWriter, err error) {
	var other refused
	switch {
	case errors.As(err, &other):
		http.Error(w, other.text, other.status)
	case errors.Is(err, sql.ErrNoRows):
		http.Error(w, "not found", http.StatusNotFound)
	default:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func reply(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(value)
}

func page(query url.Values) (after int64, limit int64, err error) {
	limit = 50
	if text := query.Get("limit"); text != "" {
		if limit, err = strconv.ParseInt(text, 10, 64); err != nil || limit < 1 || limit > pageLimit {
			return 0, 0, errors.New("invalid limit")
		}
	}
	if text := query.Get("after"); text != "" {
		if after, err = strconv.ParseInt(text, 10, 64); err != nil {
			return 0, 0, errors.New("invalid after")
		}
	}
	return after, limit, nil
}

func database() *sql.DB {
	db, err := sql.Open("postgres", os.Getenv("DSN"))
	if err != nil {
		log.Fatal(err)
	}
	db.SetMaxOpenConns(maxConnections)
	db.SetMaxIdleConns(maxConnections)
	return db
}

func prepare(db *sql.DB, query string) *sql.Stmt {
	statement, err := db.Prepare(query)
	if err != nil {
		log.Fatal(err)
	}
	return statement
}

func queryProducts(ctx context.Context, statement *sql.Stmt, values ...any) ([]Product, error) {
	rows, err := statement.QueryContext(ctx, values...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	products := []Product{}
	for rows.Next() {
		product, err := scanProduct(rows)
		if err != nil {
			return nil, err
		}
		products = append(products, product)
	}
	return products, rows.Err()
}

func scanProduct(row interface{ Scan(...any) error }) (Product, error) {
	var p Product
	err := row.Scan(&p.ID, &p.SKU, &p.Name, &p.Description, &p.PriceMinor, &p.Currency, &p.Category, &p.Status,
		&p.CreatedAt, &p.UpdatedAt)
	return p, err
}
