package registry

import (
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

// stepSize is how many bytes are sent at most until the deadline is moved: a client that
// receives less than that within the stall timeout is cut off.
const stepSize = 128 << 10

// response sends an answer, remembers what was sent, and cuts off a receiver
// that stalls: it moves the write deadline on before every step.
type response struct {
	http.ResponseWriter
	control *http.ResponseController
	stall   time.Duration
	request *body // of the request

	headOnly bool // the answer has no body, whatever is written

	success int   // the status of an answer that begins with Write, 0 is 200
	status  int   // as sent, 0 where nothing was
	sent    int64 // bytes of the body
	err     error // the first of a write

	mu   sync.Mutex
	over bool // its deadline is not to be moved any more
}

// newResponse returns the response to a request, and in it the request's body,
// where neither moves on without a byte for longer than stall.
func newResponse(hw http.ResponseWriter, r *http.Request, stall time.Duration) *response {
	control := http.NewResponseController(hw)
	if r.ContentLength != 0 {
		// Also where a body is refused: net/http reads some of it then.
		control.SetReadDeadline(time.Now().Add(stall))
	}
	hw.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	return &response{
		ResponseWriter: hw, control: control, stall: stall, headOnly: r.Method == http.MethodHead,
		request: &body{src: r.Body, control: control, stall: stall, ended: r.ContentLength == 0 || r.ProtoMajor != 1},
	}
}

// Unwrap lets [http.ResponseController] find the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements [http.ResponseWriter].
func (w *response) WriteHeader(status int) {
	w.status = status
	if w.request.finish() {
		w.Header().Set("Connection", "close")
	}
	w.moveDeadline()
	w.ResponseWriter.WriteHeader(status)
}

// cut ends a write under way, and those that come, and the same of reads of the body.
func (w *response) cut() {
	w.mu.Lock()
	w.over = true
	w.control.SetWriteDeadline(time.Unix(1, 0))
	w.mu.Unlock()
	w.request.interrupt()
}

func (w *response) moveDeadline() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.control.SetWriteDeadline(time.Now().Add(w.stall))
	}
}

// begin sends the header where that has not been done.
func (w *response) begin() {
	if w.status == 0 {
		w.WriteHeader(max(w.success, http.StatusOK))
	}
}

// Write implements [http.ResponseWriter].
func (w *response) Write(p []byte) (done int, err error) {
	w.begin()
	if w.headOnly {
		return len(p), nil
	}
	for len(p) > 0 && err == nil {
		var n int
		w.moveDeadline()
		n, err = w.ResponseWriter.Write(p[:min(len(p), stepSize)])
		p, done = p[n:], done+n
	}
	w.wrote(int64(done), err)
	return done, err
}

func (w *response) wrote(n int64, err error) {
	w.sent += n
	if w.err == nil {
		w.err = err
	}
}

// writer returns where the body is written to. Over plain TCP it takes files in the kernel.
func (w *response) writer(r *http.Request) io.Writer {
	if from, ok := w.ResponseWriter.(io.ReaderFrom); ok && r.TLS == nil && r.ProtoMajor == 1 {
		return &fileResponse{w, from}
	}
	return w
}

// fileResponse is a response that takes files.
type fileResponse struct {
	*response
	from io.ReaderFrom
}

// ReadFrom implements [io.ReaderFrom].
func (w *fileResponse) ReadFrom(src io.Reader) (done int64, err error) {
	w.begin()
	// net/http recognises a file within one LimitedReader, not within two.
	limit, limited := src.(*io.LimitedReader)
	if limited {
		src = limit.R
	}
	for {
		step := int64(stepSize)
		if limited {
			step = min(step, limit.N)
		}
		w.moveDeadline()
		var n int64
		n, err = w.from.ReadFrom(&io.LimitedReader{R: src, N: step})
		done += n
		if limited {
			limit.N -= n
		}
		if err != nil || n < stepSize {
			break
		}
	}
	w.wrote(done, err)
	return done, err
}

// body is the body of a request. It cuts off a sender that stalls.
type body struct {
	src     io.Reader
	control *http.ResponseController
	stall   time.Duration

	received int64
	ended    bool  // it has been read to its end, or broke, or HTTP/2 sees to that
	err      error // that ended it, but for io.EOF

	mu          sync.Mutex
	over        bool // its deadline is not to be moved any more
	interrupted bool
}

// Read implements [io.Reader].
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	if !b.over {
		b.control.SetReadDeadline(time.Now().Add(b.stall))
	}
	b.mu.Unlock()
	n, err := b.src.Read(p)
	b.received += int64(n)
	if err != nil {
		b.ended = true
		b.finish() // net/http watches the connection from now on
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// SetReadDeadline ends a Read under way, and those that come, where the
// deadline is in the past: the only use of it there is.
func (b *body) SetReadDeadline(t time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return nil
	}
	b.over, b.interrupted = true, true
	return b.control.SetReadDeadline(t)
}

// firstOf is the first n bytes of a body.
type firstOf struct {
	io.LimitedReader
	*body
}

func (b *body) first(n int64) *firstOf { return &firstOf{io.LimitedReader{R: b, N: n}, b} }

// Read implements [io.Reader].
func (f *firstOf) Read(p []byte) (int, error) { return f.LimitedReader.Read(p) }

// interrupt ends a Read under way, and those that come.
func (b *body) interrupt() { b.SetReadDeadline(time.Unix(1, 0)) }

// finish says that the body has nothing to do with the connection any more: at
// its end, and when the request is answered. It reports whether a Read was
// interrupted. Where that came just when the body ended, net/http takes the
// connection for broken, and gives up every request on it: it is of no more use.
func (b *body) finish() (interrupted bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	return b.interrupted
}

// lingerTime is how long a client that was refused may go on sending, until the
// connection is closed whether it has read the answer or not.
const lingerTime = 10 * time.Second

// discard reads what is left of the body for a while. The caller has it for itself.
func (b *body) discard() {
	b.finish()
	b.control.SetReadDeadline(time.Now().Add(min(lingerTime, b.stall)))
	n, _ := io.Copy(io.Discard, b.src) // whatever ends it, nothing is left to be said
	b.received += n
}

// stalled reports whether the sender was cut off.
func (b *body) stalled() bool { return errors.Is(b.err, os.ErrDeadlineExceeded) }
