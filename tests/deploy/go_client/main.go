// Command shop registers an account, places an order, pays it and reads its timeline, over gRPC: ADDRESS [CA].
//
// It shows how a client in Go signs in, sets deadlines and reads the details of errors. It prints what it got as JSON.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	orders "example.com/shop/mercato/orders/v1"
	users "example.com/shop/mercato/users/v1"
)

// Callers wait so long at most for one answer. A shop that has just started is slower.
const patience = 30 * time.Second

// The shop refuses to guess passwords after a few; so many calls reach that bound.
const guesses = 20

// A bought is what the program prints.
type bought struct {
	OrderID    int64
	TotalMinor int64
	PaidMinor  int64
	Replayed   bool
	Parts      []string
	Wrong      failure // an order with two wrong fields
	Unknown    failure // an order that is none
	Guessed    failure // a password, too often
	Late       failure // a call that waits longer than its deadline
	AfterLate  string  // the state of the payment of that order
}

// A failure is what an error of the shop says.
type failure struct {
	Code         string
	Reason       string            // of ErrorInfo: the shop's code of the error
	Fields       map[string]string // of BadRequest
	RetrySeconds float64           // of RetryInfo
	RequestID    string            // of RequestInfo
	OrderID      int64             // of OrderNotFound, the shop's own message
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	transport := insecure.NewCredentials()
	if len(arguments) == 2 {
		var err error
		if transport, err = credentials.NewClientTLSFromFile(arguments[1], ""); err != nil {
			return err
		}
	}
	connection, err := grpc.NewClient(arguments[0], grpc.WithTransportCredentials(transport))
	if err != nil {
		return err
	}
	defer connection.Close()
	shown, err := buy(users.NewUsersServiceClient(connection), orders.NewOrdersServiceClient(connection))
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(shown)
}

func buy(accounts users.UsersServiceClient, shop orders.OrdersServiceClient) (*bought, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	defer cancel()
	email, password := "gopher@example.com", "correct horse battery"
	if _, err := accounts.Register(ctx, &users.Register{Email: email, Name: "Gopher", Password: password}); err != nil {
		return nil, err
	}
	tokens, err := accounts.SignIn(ctx, &users.SignIn{Email: email, Password: password})
	if err != nil {
		return nil, err
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tokens.AccessToken)

	key := "once"
	wanted := &orders.PlaceOrder{Lines: []*orders.PlaceLine{{ProductId: 100}}, IdempotencyKey: &key}
	placed, err := shop.Place(ctx, wanted)
	if err != nil {
		return nil, err
	}
	again, err := shop.Place(ctx, wanted)
	if err != nil {
		return nil, err
	}
	method := "sandbox:ok"
	paid, err := shop.Pay(ctx, &orders.PayOrder{Id: placed.Order.Id, Method: &method})
	if err != nil {
		return nil, err
	}
	timeline, err := shop.Timeline(ctx, &orders.GetTimeline{Id: placed.Order.Id})
	if err != nil {
		return nil, err
	}
	shown := &bought{
		OrderID:    placed.Order.Id,
		TotalMinor: placed.Order.TotalMinor,
		PaidMinor:  paid.Payment.AmountMinor,
		Replayed:   again.Replayed && again.Order.Id == placed.Order.Id,
	}
	for _, entry := range timeline.Entries {
		shown.Parts = append(shown.Parts, entry.Part.String())
	}
	if err := fail(ctx, accounts, shop, email, shown); err != nil {
		return nil, err
	}
	return shown, wait(ctx, shop, shown)
}

// fail makes calls that the shop refuses.
func fail(
	ctx context.Context, accounts users.UsersServiceClient, shop orders.OrdersServiceClient, email string, shown *bought,
) error {
	many := int64(20_000)
	_, err := shop.Place(ctx, &orders.PlaceOrder{Lines: []*orders.PlaceLine{{ProductId: 0, Quantity: &many}}})
	shown.Wrong = read(err)
	_, err = shop.Get(ctx, &orders.GetOrder{Id: 1 << 52})
	shown.Unknown = read(err)
	for range guesses {
		_, err = accounts.SignIn(ctx, &users.SignIn{Email: email, Password: "not this one"})
		if status.Code(err) == codes.ResourceExhausted {
			shown.Guessed = read(err)
			return nil
		}
	}
	return fmt.Errorf("%d wrong passwords, and the last answer was: %w", guesses, err)
}

// wait asks for the end of a payment that takes a minute, with a deadline before that.
func wait(ctx context.Context, shop orders.OrdersServiceClient, shown *bought) error {
	placed, err := shop.Place(ctx, &orders.PlaceOrder{Lines: []*orders.PlaceLine{{ProductId: 100}}})
	if err != nil {
		return err
	}
	method := "sandbox:slow:60000"
	paid, err := shop.Pay(ctx, &orders.PayOrder{Id: placed.Order.Id, Method: &method})
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err = shop.Settled(short, &orders.AwaitOrder{Id: placed.Order.Id, WaitMs: 60_000})
	shown.Late = read(err)
	shown.AfterLate = paid.Payment.Status.String()
	return nil
}

func read(err error) failure {
	said := status.Convert(err)
	shown := failure{Code: said.Code().String(), Fields: map[string]string{}}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			shown.Reason = detail.Reason
		case *errdetails.BadRequest:
			for _, wrong := range detail.FieldViolations {
				shown.Fields[wrong.Field] = wrong.Description
			}
		case *errdetails.RetryInfo:
			shown.RetrySeconds = detail.RetryDelay.AsDuration().Seconds()
		case *errdetails.RequestInfo:
			shown.RequestID = detail.RequestId
		case *orders.OrderNotFound:
			shown.OrderID = detail.OrderId
		}
	}
	return shown
}
