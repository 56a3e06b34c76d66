package p2p

import "context"

type noticeKey struct{}

// WithNotice returns a context with which an Open, and the blob that it returns for as long as it
// arrives, call notice with what they wait for, in words, when nothing has moved for a while, and
// then now and again. The Commit of an Ingest that was begun with it calls notice, before it returns nil,
// with what its caller should know although all is stored: that others can't find it yet, for example.
// Calls may come from any goroutine; notice must not block.
func WithNotice(ctx context.Context, notice func(text string)) context.Context {
	return context.WithValue(ctx, noticeKey{}, notice)
}

// NoticeOf returns what was given to [WithNotice], or nil.
func NoticeOf(ctx context.Context) func(text string) {
	notice, _ := ctx.Value(noticeKey{}).(func(text string))
	return notice
}
